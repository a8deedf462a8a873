"""This host's `tpm2-pcr-signature.json`, which systemd's stub or its package puts there, for nested boot-policy forms.

Read only if a form asks for it. A file that is missing or cannot be used leaves the other forms as they are: it is said
where a signature is missed. Paths as systemd-cryptsetup(8) has them, `tpm2-signature=`.
"""

from __future__ import annotations

import os
from typing import Final

from oci_hook.attestation.boot_policy import BootPolicy, with_host_signatures
from oci_hook.attestation.pcr_signature import LIMIT_BYTES, UnverifiedPcrSignature, parse_pcr_signatures
from oci_hook.config import Config
from oci_hook.errors import BootPolicyInvalid, SczError
from oci_hook.trusted_file import load_root_file

SECOND_FILE: Final = "/usr/lib/systemd/tpm2-pcr-signature.json"
"""Where a distribution's package puts it; whose file it is does not matter, as the signatures are verified."""


def with_signatures_of_host(boot_policy: BootPolicy, config: Config) -> BootPolicy:
    """The same boot policy, whose nested forms know which values their keys signed for this host.

    Args:
        boot_policy: Verified; without a nested form nothing is read.
        config: Names the file; where it is not there, `SECOND_FILE` is read.
    """
    if not any(form.signed is not None for form in boot_policy.forms):
        return boot_policy
    return with_host_signatures(boot_policy, *_load(config.boot_pcr_signature))


def _load(configured: str) -> tuple[tuple[UnverifiedPcrSignature, ...], str]:
    """The entries of the first file that is there, and in words where they come from."""
    places = (configured, SECOND_FILE)
    path = next((place for place in places if os.path.lexists(place)), None)
    if path is None:
        return (), f"there is no {' and no '.join(places)}"
    try:
        return parse_pcr_signatures(load_root_file(path, limit_bytes=LIMIT_BYTES, error=BootPolicyInvalid)), path
    except SczError as error:
        return (), f"{path} cannot be used ({error.message})"
