"""SCZ-SMM: an OCI hook that guards AI models in use. See README.md and docs/specification.md."""

__version__ = "0.1.0"
