"""The scene of the integration tests, once more: these tests run beside those."""

from __future__ import annotations

from tests.integration.conftest import model_source, scene

__all__ = ["model_source", "scene"]
