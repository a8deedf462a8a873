"""The model bundle: encrypted files in an OCI image layout, the owner's signed manifest, and grants to devices."""
