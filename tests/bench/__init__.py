"""Benchmarks: `python -m tests.bench NAME`. They print numbers and assert nothing about them."""
