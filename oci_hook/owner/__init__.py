"""The model owner's side: the folder with the owner's keys, content keys, devices and grants. No TPM is needed."""
