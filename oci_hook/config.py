"""The host's configuration: a TOML file of root's, read into a frozen `Config`. Every key has a default.

It says where things are and how this host is made; it cannot relax what a model's owner signed. `config/config.toml`
is the commented example.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from typing import Any, Literal, cast

from oci_hook.documents import Fields
from oci_hook.errors import ConfigInvalid
from oci_hook.https_client import ADDRESS, ADDRESS_AND_PATH
from oci_hook.trusted_file import load_root_file

DEFAULT_CONFIG_FILE = "/etc/scz-smm/config.toml"
VERSION = 1
"""Of the configuration's form; a later one may mean something else by the same keys, so it is refused."""
Engine = Literal["podman", "cri-o", "containerd", "docker"]
_ENGINES = r"podman|cri-o|containerd|docker"
_ABSOLUTE = r"/[^\x00-\x1f]{0,511}"


@dataclass(frozen=True, slots=True)
class Config:
    """What root decided for this host. Paths are absolute, times in seconds, sizes in bytes."""

    engine: Engine = "podman"
    tpm_tcti: str = "device:/dev/tpmrm0"
    tpm_timeout_seconds: int = 60
    tpm_event_log: str = "/sys/kernel/security/tpm0/binary_bios_measurements"
    token_path: str = "/var/run/secrets/scz-smm/token"  # noqa: S105 - a path in the container, not a secret
    token_leeway_seconds: int = 5
    memory_reserve_bytes: int = 256 << 20
    store_directory: str = "/var/lib/scz-smm"
    trust_directory: str = "/etc/scz-smm/trust"
    runtime_directory: str = "/run/scz-smm"
    audit_file: str = "/var/log/scz-smm/audit.jsonl"
    tsm_directory: str = "/sys/kernel/config/tsm/report"
    nri_engine: Engine = "containerd"
    nri_socket: str = "/var/run/nri/nri.sock"
    nri_vm_handlers: tuple[str, ...] = ("kata*",)
    boot_pcr_signature: str = "/run/systemd/tpm2-pcr-signature.json"
    guest_agent: str = "/usr/bin/kata-agent"
    guest_timeout_seconds: int = 7
    broker_address: str = ""
    broker_ca_file: str = ""
    broker_timeout_seconds: int = 10
    keylime_address: str = ""
    keylime_ca_file: str = ""
    keylime_certificate: str = ""
    keylime_key: str = ""
    keylime_timeout_seconds: int = 10


def parse_config(data: bytes) -> Config:
    """Parse the configuration.

    Args:
        data: TOML in UTF-8, at most 64 KiB.

    Raises:
        ConfigInvalid: It is not TOML, of a newer version, or a key is unknown, of the wrong type or out of range.
    """
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise ConfigInvalid(f"the configuration is not TOML: {cause}") from cause
    top = Fields(document, what="configuration", error=ConfigInvalid)
    _verify_version(top)
    default = Config()

    def section(name: str) -> Fields:
        return top.fields(name) if top.has(name) else Fields({}, what=name, error=ConfigInvalid)

    def text(fields: Fields, name: str, fallback: str, pattern: str) -> str:
        return fields.string(name, pattern=pattern, limit=512) if fields.has(name) else fallback

    def number(fields: Fields, name: str, fallback: int, low: int, high: int) -> int:
        return fields.integer(name, low=low, high=high) if fields.has(name) else fallback

    def patterns(fields: Fields, name: str, fallback: tuple[str, ...]) -> tuple[str, ...]:
        return fields.items(name, _handler, low=0, high=32) if fields.has(name) else fallback

    tpm, token, memory, paths = section("tpm"), section("token"), section("memory"), section("paths")
    nri = section("nri")
    guest, boot, broker = section("guest"), section("boot"), section("broker")
    config = Config(
        engine=cast(Engine, text(top, "engine", default.engine, _ENGINES)),
        tpm_tcti=text(tpm, "tcti", default.tpm_tcti, r"(device|swtpm|tabrmd)(:[\x21-\x7e]*)?"),
        tpm_timeout_seconds=number(tpm, "timeout_seconds", default.tpm_timeout_seconds, 1, 600),
        tpm_event_log=text(tpm, "event_log", default.tpm_event_log, _ABSOLUTE),
        token_path=text(token, "path", default.token_path, _ABSOLUTE),
        token_leeway_seconds=number(token, "leeway_seconds", default.token_leeway_seconds, 0, 60),
        memory_reserve_bytes=number(memory, "reserve_bytes", default.memory_reserve_bytes, 0, 1 << 50),
        store_directory=text(paths, "store", default.store_directory, _ABSOLUTE),
        trust_directory=text(paths, "trust", default.trust_directory, _ABSOLUTE),
        runtime_directory=text(paths, "runtime", default.runtime_directory, _ABSOLUTE),
        audit_file=text(paths, "audit", default.audit_file, _ABSOLUTE),
        tsm_directory=text(paths, "tsm", default.tsm_directory, _ABSOLUTE),
        nri_engine=cast(Engine, text(nri, "engine", default.nri_engine, "containerd|cri-o")),
        nri_socket=text(nri, "socket", default.nri_socket, _ABSOLUTE),
        nri_vm_handlers=patterns(nri, "vm_handlers", default.nri_vm_handlers),
        boot_pcr_signature=text(boot, "pcr_signature", default.boot_pcr_signature, _ABSOLUTE),
        guest_agent=text(guest, "agent", default.guest_agent, _ABSOLUTE),
        guest_timeout_seconds=number(guest, "timeout_seconds", default.guest_timeout_seconds, 1, 600),
        broker_address=_or_empty(broker, "address", ADDRESS),
        broker_ca_file=_or_empty(broker, "ca_file", _ABSOLUTE),
        broker_timeout_seconds=number(broker, "timeout_seconds", default.broker_timeout_seconds, 1, 600),
        **_keylime(top),
    )
    for fields in (tpm, token, memory, paths, nri, guest, boot, broker, top):
        _finish(fields)
    return config


def _or_empty(fields: Fields, name: str, pattern: str) -> str:
    """A text of that pattern; empty, which means none, if it is absent or empty."""
    value = fields.take(name) if fields.has(name) else ""
    one = Fields({name: value}, what="configuration", error=ConfigInvalid)
    return "" if value == "" else one.string(name, pattern=pattern, limit=512)


def _keylime(top: Fields) -> dict[str, Any]:
    """The section `[keylime]`; an empty text means the same as none."""
    fields = top.fields("keylime") if top.has("keylime") else Fields({}, what="keylime", error=ConfigInvalid)
    found: dict[str, Any] = {"keylime_address": _or_empty(fields, "address", ADDRESS_AND_PATH)}
    for name in ("ca_file", "certificate", "key"):
        found[f"keylime_{name}"] = _or_empty(fields, name, _ABSOLUTE)
    if fields.has("timeout_seconds"):
        found["keylime_timeout_seconds"] = fields.integer("timeout_seconds", low=1, high=600)
    _finish(fields)
    return found


def _handler(value: object) -> str:
    """A handler's name, or a pattern; empty for the engine's default one."""
    return (
        ""
        if value == ""
        else Fields({"vm_handlers": value}, what="nri", error=ConfigInvalid).string(
            "vm_handlers", pattern=r"[A-Za-z0-9*?_.-]+", limit=63
        )
    )


def _verify_version(top: Fields) -> None:
    version = top.integer("version", low=1, high=1 << 31) if top.has("version") else VERSION
    if version > VERSION:
        raise ConfigInvalid(
            f"this configuration is of version {version}; this scz-smm reads version {VERSION}",
            remedy="upgrade the package scz-smm, or write the configuration for the version that is installed",
        )


def _finish(fields: Fields) -> None:
    try:
        fields.finish()
    except ConfigInvalid as cause:
        raise ConfigInvalid(
            f"{cause.message}; a newer scz-smm may know it",
            remedy="correct the key (scz-smm.toml(5) lists them all), or upgrade the package scz-smm",
        ) from cause


def load_config(path: str = DEFAULT_CONFIG_FILE) -> Config:
    """Read the configuration from a file that belongs to root and that root alone can write.

    The file at the default place may be absent: every key has a default, and none of them weakens anything.

    Raises:
        ConfigInvalid: The file is not root's alone, or its contents cannot be used.
        FileUnreadable: A file at another place is absent.
    """
    if path == DEFAULT_CONFIG_FILE and not os.path.lexists(path):
        return Config()
    return parse_config(load_root_file(path, limit_bytes=64 << 10, error=ConfigInvalid))
