"""What the shells complete beyond commands and options: models, devices, trusted names, containers, files.

click calls these while somebody types, before anything was checked: nothing is written, no TPM is asked, no signature
verified, and what cannot be read, by someone who is not root say, completes to nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from oci_hook.config import DEFAULT_CONFIG_FILE, Config, load_config
from oci_hook.errors import SczError

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completer(candidates: Callable[[click.Context], Iterable[str]]) -> Completer:
    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        with contextlib.suppress(SczError, OSError):
            return [CompletionItem(text) for text in candidates(context) if text.startswith(incomplete)]
        return []

    return complete


def _config(context: click.Context) -> Config:
    """The configuration that the words before name; `sczctl` itself was not run, so nobody read it yet."""
    return load_config(str(context.find_root().params.get("config_file") or DEFAULT_CONFIG_FILE))


def _models(context: click.Context) -> Iterable[str]:
    from oci_hook.store import Store

    return [f"{name}:{version}" for name, version in Store(_config(context).store_directory).names()]


def _packed(context: click.Context) -> Iterable[str]:
    from oci_hook.owner.records import OwnerRecords

    keys = context.params.get("keys")
    return [f"{name}:{version}" for name, version in OwnerRecords(Path(keys)).content_keys()] if keys else []


def _model_lines(context: click.Context) -> Iterable[str]:
    return sorted({model.partition(":")[0] for model in _packed(context)})


def _devices(context: click.Context) -> Iterable[str]:
    from oci_hook.owner.records import OwnerRecords

    keys = context.params.get("keys")
    return OwnerRecords(Path(keys)).devices() if keys else []


def _trusted(context: click.Context) -> Iterable[str]:
    from oci_hook.trust_folder import Trust

    return Trust(_config(context).trust_directory).names(f"{context.params.get('kind')}s")


def _containers(context: click.Context) -> Iterable[str]:
    from oci_hook.records import ContainerRecords

    return [record.container_id for record in ContainerRecords(_config(context).runtime_directory).live()]


def _refused(context: click.Context) -> Iterable[str]:
    from oci_hook.report import load_refusals

    return [refusal.container_id for refusal in load_refusals(_config(context).runtime_directory)]


complete_models = _completer(_models)
"""Models in this host's store, as NAME:VERSION."""
complete_packed = _completer(_packed)
"""Versions that the owner of --keys packed."""
complete_model_lines = _completer(_model_lines)
"""Their names."""
complete_devices = _completer(_devices)
"""Devices that are enrolled with the owner of --keys."""
complete_trusted = _completer(_trusted)
"""Owners or issuers, by the argument `kind`, that this host trusts."""
complete_containers = _completer(_containers)
"""Running containers that hold a model."""
complete_refused = _completer(_refused)
"""Containers whose refusal is kept."""


def complete_files(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files: the shell finds them itself."""
    return [CompletionItem(incomplete, type="file")]
