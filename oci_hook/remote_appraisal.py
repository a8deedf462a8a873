"""Remote appraisal: the evidence goes to a verifier of Keylime, and its answer decides.

Asked by the attested host itself it is a diagnosis: whoever is root there may ask another verifier, or none. Another
party that asks (`sczctl appraise --keylime`) has a gate. docs/keylime.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.keylime import LIMIT_BYTES, PATH, keylime_request, read_keylime_answer
from oci_hook.attestation.structures import Public
from oci_hook.config import Config
from oci_hook.errors import ConfigInvalid
from oci_hook.https_request import Server, request
from oci_hook.key_errors import VerifierUnavailable
from oci_hook.trusted_file import load_root_file

_CA_LIMIT_BYTES = 1 << 20


def host_verifier(config: Config) -> Server:
    """The verifier that root's configuration names.

    Raises:
        ConfigInvalid: It names none, or a file of it is not root's alone.
        FileUnreadable: A file of it cannot be read.
    """
    if not config.keylime_address or not config.keylime_ca_file:
        raise ConfigInvalid(
            "the model asks for a remote appraisal, and the configuration names no verifier",
            remedy="set address and ca_file under [keylime] in /etc/scz-smm/config.toml",
        )
    if bool(config.keylime_certificate) != bool(config.keylime_key):
        raise ConfigInvalid("certificate and key under [keylime] belong together")
    for path in (config.keylime_certificate, config.keylime_key):
        if path:
            is_secret = path == config.keylime_key
            load_root_file(path, limit_bytes=_CA_LIMIT_BYTES, error=ConfigInvalid, is_secret=is_secret)
    ca = load_root_file(config.keylime_ca_file, limit_bytes=_CA_LIMIT_BYTES, error=ConfigInvalid)
    return Server(config.keylime_address, parse_ca(ca), config.keylime_certificate or None, config.keylime_key or None)


def parse_ca(data: bytes) -> str:
    """PEM as the TLS library wants it.

    Raises:
        ConfigInvalid: Not ASCII.
    """
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as cause:
        raise ConfigInvalid("the CA's file is not PEM") from cause


def ask_keylime(
    server: Server,
    quote: Evidence,
    *,
    ak: Public,
    extra_data: bytes,
    reference: Mapping[int, bytes],
    timeout_seconds: float,
) -> None:
    """Let the verifier check a quote; it returns if that was accepted.

    Raises:
        ConfigInvalid: The server cannot be asked as it is configured.
        AppraisalRefused: The verifier says no.
        VerifierUnavailable: It gives no usable answer in time.
    """
    body = keylime_request(quote, ak=ak, extra_data=extra_data, reference=reference)
    answer = request(
        server,
        "POST",
        PATH,
        body,
        {"Content-Type": "application/json", "Accept": "application/json"},
        timeout_seconds=timeout_seconds,
        limit_bytes=LIMIT_BYTES,
        error=VerifierUnavailable,
    )
    read_keylime_answer(answer.status, answer.body)
