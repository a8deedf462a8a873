"""Engines: what makes each of them call the hook, and whether it does.

One module an engine. Each plans from what the host has and changes nothing; `placing` carries a plan out.
"""
