"""An owner's memory of a model line: what of it was revoked, and which epoch its boot policies are in.

Pure; `records` keeps the documents. Specification: docs/specification.md, "Owner".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from oci_hook.attestation.boot_policy import EPOCH_LIMIT
from oci_hook.bundle.model import GENERATION_HIGH, VERSION, VERSION_LIMIT, ModelId
from oci_hook.documents import Fields, canonical, parse_object
from oci_hook.errors import KeyInvalid
from oci_hook.trust import NAME, NAME_LIMIT

LINE_LIMIT_BYTES: Final = 1 << 20
_SCHEMA: Final = "scz-smm/line/v1"
_MANY: Final = 10_000


@dataclass(frozen=True, slots=True)
class Line:
    """A model line.

    Attributes:
        model: Its name.
        lowest_generation: The lowest that may be granted and started; 1: all.
        revoked: Versions that may not be granted, whatever their generation; sorted.
        epochs: By device class, how often all boot states that were signed before were withdrawn; absent: 0.
    """

    model: str
    lowest_generation: int = 1
    revoked: tuple[str, ...] = ()
    epochs: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def allows(self, model: ModelId) -> bool:
        """Whether a version of this line may be granted."""
        return model.generation >= self.lowest_generation and model.version not in self.revoked

    def epoch(self, device_class: str) -> int:
        """The epoch in which boot policies for a device class are signed now."""
        return self.epochs.get(device_class, 0)

    def without(self, version: str) -> Line:
        """The line with one version revoked.

        Raises:
            KeyInvalid: It would be more than a line's document holds.
        """
        return _readable(replace(self, revoked=tuple(sorted({*self.revoked, version}))))

    def from_generation(self, lowest: int) -> Line:
        """The line with all generations below `lowest` revoked; those that were stay so."""
        return replace(self, lowest_generation=max(lowest, self.lowest_generation))

    def with_next_epoch(self, device_class: str) -> Line:
        """The line with all boot states withdrawn that were signed for a device class.

        Raises:
            KeyInvalid: It has no further epoch, or would have more than a line's document holds.
        """
        epoch = self.epoch(device_class) + 1
        if epoch > EPOCH_LIMIT:
            raise KeyInvalid(f"the boot policies of {self.model} and {device_class} have no further epoch")
        return _readable(replace(self, epochs=MappingProxyType({**self.epochs, device_class: epoch})))


def _readable(line: Line) -> Line:
    """The line, unless `parse_line` would refuse it: nothing could be granted or revoked any more."""
    if max(len(line.revoked), len(line.epochs)) > _MANY or len(format_line(line)) > LINE_LIMIT_BYTES:
        raise KeyInvalid(
            f"of the model line {line.model} no more than {_MANY} versions or device classes, in "
            f"{LINE_LIMIT_BYTES >> 20} MiB, can be remembered as revoked one by one",
            remedy=f"revoke by generations: `sczctl revoke --below-generation {line.model}:NUMBER`",
        )
    return line


def format_line(line: Line) -> bytes:
    """The document's bytes."""
    versions: dict[str, object] = {"lowest_generation": line.lowest_generation, "revoked": list(line.revoked)}
    return canonical({"schema": _SCHEMA, "model": line.model, **versions, "epochs": dict(line.epochs)})


def parse_line(data: bytes) -> Line:
    """Parse a line's document.

    Raises:
        KeyInvalid: Malformed, or larger than 1 MiB.
    """
    what = "model line"
    document = parse_object(data, limit_bytes=LINE_LIMIT_BYTES, what=what, error=KeyInvalid)
    fields = Fields(document, what=what, error=KeyInvalid)
    fields.literal("schema", _SCHEMA)
    line = Line(
        model=fields.string("model", pattern=NAME, limit=NAME_LIMIT),
        lowest_generation=fields.integer("lowest_generation", low=1, high=GENERATION_HIGH),
        revoked=fields.strings("revoked", low=0, high=_MANY, pattern=VERSION, limit=VERSION_LIMIT),
        epochs=_epochs(fields.take("epochs")),
    )
    fields.finish()
    return line


def _epochs(value: object) -> Mapping[str, int]:
    classes = value if isinstance(value, dict) else {}
    fields = Fields(value, what="model line: epochs", error=KeyInvalid)
    named = Fields({"classes": list(classes)}, what="model line: epochs", error=KeyInvalid)
    names = named.strings("classes", low=0, high=_MANY, pattern=NAME, limit=NAME_LIMIT)
    return MappingProxyType({name: fields.integer(name, low=1, high=EPOCH_LIMIT) for name in names})
