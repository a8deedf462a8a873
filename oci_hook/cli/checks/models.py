"""The store: whether this device could open each model now, its files are whole, and memory and time suffice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oci_hook.access_policy import AccessPolicy
from oci_hook.attestation.appraisal import differing_pcrs, missing_signature, nearest_form, pcrs_in_words
from oci_hook.attestation.boot_policy import BootPolicy
from oci_hook.attestation.host_device import HostDevice
from oci_hook.broker import verify_broker_named
from oci_hook.bundle.files import closing
from oci_hook.bundle.layout import Layout, verify_digests
from oci_hook.bundle.manifest import Manifest
from oci_hook.cli.checks.boot import what_differs
from oci_hook.cli.checks.check import Check, failed, mib
from oci_hook.cli.checks.tpm import Counted, TpmAnswer
from oci_hook.config import Config
from oci_hook.delivery.memory import load_available_memory
from oci_hook.errors import BundleInvalid, BundleMismatch, FileUnreadable, SczError, StoreInvalid
from oci_hook.granted import verified_boot_policy, verified_grant, verified_revocations, verify_counted
from oci_hook.key_errors import TeeUnavailable
from oci_hook.provenance import verified_manifest
from oci_hook.remote_appraisal import host_verifier
from oci_hook.revoked import verify_in_force
from oci_hook.store import Store
from oci_hook.trust import Owner

START_SECONDS, BYTES_PER_SECOND = 10, 100_000_000
_FASTEST_BYTES_PER_SECOND = 1_000_000_000
MOST_SECONDS = 3600  # of `--timeout`


@dataclass(frozen=True, slots=True)
class StoredSize:
    """A model that is whole, and the plaintext bytes that it takes."""

    name: str
    size_bytes: int


def needed_seconds(size_bytes: int) -> int:
    """How long a hook may need for a model: 10 s for the TPM and the start, and a second for each 100 MB of it."""
    return START_SECONDS - (-size_bytes // BYTES_PER_SECOND)


def check_models(
    config: Config,
    owners: Sequence[Owner],
    device: HostDevice | None,
    tpm: TpmAnswer | None,
    sizes: list[StoredSize],
    *,
    deep: bool,
) -> Iterator[Check]:
    """Each model: whether its files are whole, and this device could open it, so far as can be told without its key.

    Args:
        tpm: What the TPM said; None: it did not answer.
        sizes: The models that are whole are added to it.
        deep: Hash every file, not only look at its size.
    """
    store = Store(config.store_directory)
    pcrs = tpm.pcrs if tpm is not None else {}
    try:
        names = store.names()
    except SczError as error:
        yield failed("models", error)
        return
    if not names:
        yield Check("models", "fail", "no model is in the store", "`sczctl add FOLDER`, as its owner sent it")
    for name, version in names:
        what = f"model {name}:{version}"
        try:
            model = store.load_model(name, version)
            if model.image_digest is None:
                store.load_grant(model.manifest_digest)
                yield Check(what, "ok", "its grant; an image carries the bundle (rootfs:), which was not looked at")
                continue
            with store.open_model(model) as layout:
                manifest, owner = verified_manifest(layout, owners)
                _verify_whole(layout, manifest, deep=deep)
            sizes.append(StoredSize(f"{name}:{version}", sum(file.size for file in manifest.files)))
            policy = _verified_boot_policy(config, manifest, owner, device, tpm.counted if tpm is not None else None)
            _verify_askable(config, manifest.access)
        except (BundleInvalid, BundleMismatch, StoreInvalid, FileUnreadable) as error:
            yield _damaged(what, name, version, error)
            continue
        except SczError as error:
            yield failed(what, error)
            continue
        if pcrs and all(differing_pcrs(form, pcrs) for form in policy.forms):
            remedy = "boot an approved state, or send `sczctl boot-policy measure` to the owner"
            message = f"the machine's boot state is none that its owner approved: {_difference(config, policy, pcrs)}"
            yield Check(what, "fail", message, remedy)
            continue
        whole = "every file hashed" if deep else "its files have their sizes"
        yield Check(what, "ok", f"{whole}; granted, with a boot policy{' that this boot state meets' if pcrs else ''}")


def _verify_askable(config: Config, access: AccessPolicy) -> None:
    """Check that this host can ask those whom the access policy names beside the TPM; they are not asked.

    Raises:
        ConfigInvalid: The configuration names no broker, or no verifier, that could be used.
        TeeUnavailable: This machine makes no reports.
    """
    if access.broker:
        verify_broker_named(config)
    if access.appraisal is not None:
        host_verifier(config)
    if access.tee is not None and not os.path.isdir(config.tsm_directory):
        raise TeeUnavailable(f"the model's owner asks for a TEE's report, and there is no {config.tsm_directory}")


def _difference(config: Config, policy: BootPolicy, pcrs: dict[int, bytes]) -> str:
    """What differs from the nearest approved state: events, if a kept log shows them, else the PCRs."""
    form = nearest_form(policy.forms, pcrs)
    differing = differing_pcrs(form, pcrs)
    lines = what_differs(config, {pcr: {form.pcrs[pcr]} for pcr in differing if pcr in form.pcrs}, pcrs)
    return "; ".join(filter(None, [pcrs_in_words(differing), missing_signature(form, differing), *lines]))


def _damaged(what: str, name: str, version: str, error: SczError) -> Check:
    line = failed(what, error)
    if line.status != "fail":
        return line
    remedy = f"`sczctl add FOLDER` again, as its owner sent it; if that refuses, `sczctl rm {name}:{version}` first"
    return Check(what, "fail", f"damaged on disk: {error.message}", remedy)


def _verify_whole(layout: Layout, manifest: Manifest, *, deep: bool) -> None:
    """Check that each layer is there with its size, or with its digest.

    Raises:
        BundleInvalid: One is missing, a link or not a regular file.
        BundleMismatch: One has another digest or size.
        FileUnreadable: The system said no.
    """
    if deep:
        verify_digests(layout, manifest, lambda _done: None)
        return
    for entry in manifest.files:
        with closing(layout.open_blob(entry.layer_digest)):
            pass


def _verified_boot_policy(
    config: Config, manifest: Manifest, owner: Owner, device: HostDevice | None, counted: Counted | None
) -> BootPolicy:
    """What admission verifies of the store's documents, and what the TPM will say to the grant."""
    store = Store(config.store_directory)
    grant = verified_grant(manifest, owner, store, device)
    policy = verified_boot_policy(owner, grant, store, config)
    revocations = verified_revocations(manifest.model, owner, grant, store)
    if device is not None and counted is not None:
        counter = counted.counters.get(grant.counter.index)
        verify_in_force(revocations, counter, device.counter_values.get(owner.owner_id))
        verify_counted(grant, counter=counter, resets=counted.resets, clock_ms=counted.clock_ms)
    return policy


def check_room(config: Config, sizes: Sequence[StoredSize]) -> Iterator[Check]:
    """Whether the models fit into what is available now, above the reserve."""
    if not sizes:
        return
    try:
        available = load_available_memory()
    except SczError as error:
        yield failed("memory for models", error)
        return
    largest = max(sizes, key=lambda model: model.size_bytes)
    total = sum(model.size_bytes for model in sizes)
    free = available - config.memory_reserve_bytes
    have = f"{mib(max(0, free))} are available above the reserve"
    if largest.size_bytes > free:
        message = f"{largest.name} takes {mib(largest.size_bytes)}, but {have}: its start is refused (48) as it is now"
        yield Check("memory for models", "warn", message, "free memory, or lower memory.reserve_bytes in config.toml")
    elif total > free:
        message = f"all models together take {mib(total)}, but {have}: not all of them can run at once"
        yield Check("memory for models", "warn", message, "run fewer of them here at once, or add memory")
    else:
        yield Check("memory for models", "ok", f"the largest takes {mib(largest.size_bytes)}, all {mib(total)}; {have}")


def judge_timeout(way: str, seconds: int | None, largest: StoredSize | None, *, command: str) -> Check:
    """Whether the time that is left to the hook suffices for the largest model, by `needed_seconds`.

    Args:
        way: By which the hook is called.
        seconds: As its files say; None: one names none, so the hook may run for ever.
        largest: None: no model is here.
        command: What makes these files anew, with `--timeout`.
    """
    name = f"hook timeout {way}"
    if seconds is None:
        message = "the hook's file names none: a hook that hangs keeps its container waiting for ever"
        return Check(name, "warn", message, f"`{command} --timeout 300`")
    if largest is None:
        return Check(name, "ok", f"{seconds} s")
    needed = needed_seconds(largest.size_bytes)
    formula = f"{largest.name} may need {needed} s (10 s + {mib(largest.size_bytes)} at 100 MB/s)"
    if seconds >= needed:
        return Check(name, "ok", f"{seconds} s; {formula}")
    hopeless = seconds * _FASTEST_BYTES_PER_SECOND < largest.size_bytes
    message = f"{seconds} s; {formula}: the runtime ends its start before it is done"
    remedy = f"`{command} --timeout {min(MOST_SECONDS, max(10, needed))}`"
    return Check(name, "fail" if hopeless else "warn", message, remedy)
