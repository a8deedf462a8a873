"""What a start was shown, kept for others to look at: the evidence of a container's models, beside its record.

It is collected by `admission`, written with the record by `records`, and read by `sczctl evidence`.
"""

from __future__ import annotations

from collections.abc import Sequence

from oci_hook.admission import Admission, Container
from oci_hook.attestation.kept_evidence import KeptEvidence, format_evidence, parse_evidence
from oci_hook.records import ContainerRecord, ContainerRecords


def kept_evidence(
    container: Container,
    admissions: Sequence[Admission],
    earlier: ContainerRecord | None,
    records: ContainerRecords,
) -> bytes:
    """What was appraised for the models of a container, with that of what it got before; for `records.write`.

    Raises:
        FileUnreadable, EvidenceInvalid: The earlier evidence cannot be read.
    """
    kept = KeptEvidence(container.container_id, tuple(admission.evidence for admission in admissions))
    before = records.load_evidence(earlier.container_id, earlier.bundle) if earlier is not None else None
    return format_evidence(parse_evidence(before).joined(kept) if before is not None else kept)
