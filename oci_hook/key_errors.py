"""The errors of a key's life: leases, revocations, event logs, and the other machines that have a say in a release.

As `errors`, whose families and numbers they share; nothing on the hook's fast path comes here.
"""

from __future__ import annotations

from oci_hook.errors import CouldNotTell, InputError, Refused, SczError

# --- input, 28-29 -----------------------------------------------------------------------------------------------------


class EventLogInvalid(InputError):
    code, summary = 28, "the measured-boot event log, or what a prediction is made of, cannot be used"
    remedy = "read it anew as root from /sys/kernel/security/tpm0/binary_bios_measurements"


class EvidenceInvalid(InputError):
    code, summary = 29, "the evidence is malformed"
    remedy = "write it anew on the host that it is about: `sczctl evidence`"


# --- refused, 55-59 ---------------------------------------------------------------------------------------------------


class LeaseExpired(Refused):
    code, summary = 55, "the lease of the grant has ended"
    remedy = "`sczctl lease request`, then ask the model's owner for a renewal and `sczctl add` it"


class GenerationRefused(Refused):
    code, summary = 56, "the model's owner has revoked this version"
    remedy = "ask the model's owner for a later version, and `sczctl add` it"


class BrokerRefused(Refused):
    code, summary = 57, "the key broker refuses its share, or gives another one than the grant's"
    remedy = "look at the broker's audit log; role, bound claims and policy are in docs/broker.md"


class AppraisalRefused(Refused):
    code, summary = 58, "the remote verifier does not accept this host's evidence"
    remedy = "the message has the verifier's reasons; its policies are in docs/keylime.md"


class TeeRefused(Refused):
    code, summary = 59, "the report of the trusted execution environment is not accepted"
    remedy = "look at the message: the manifest says which platform and measurements its owner accepts"


# --- could not tell, 73-79 --------------------------------------------------------------------------------------------


class BrokerUnavailable(CouldNotTell):
    code, summary = 73, "the key broker gave no usable answer"
    remedy = "look whether it runs and is unsealed, then start the container again"


class VerifierUnavailable(CouldNotTell):
    code, summary = 74, "the remote verifier gave no usable answer"
    remedy = "look whether it runs and can be reached, then start the container again"


class TeeUnavailable(CouldNotTell):
    code, summary = 75, "there is no report of a trusted execution environment"
    remedy = "the model asks for one: run it in such a guest, with configfs mounted at /sys/kernel/config"


class RevocationsMissing(CouldNotTell):
    code, summary = (
        76,
        "the owner's list of revocations is missing, unusable, or not the one of the device's counter",
    )
    remedy = (
        "`sczctl add` the folder of the owner's latest revocation for this device; if there was none, enrol again, and "
        "add a grant that was made after it"
    )


def all_errors() -> dict[int, type[SczError]]:
    """Every error by its exit code, of `errors` and of this module; what `sczctl why` is made from."""
    families = (InputError, Refused, CouldNotTell)
    return {cls.code: cls for cls in sorted((c for f in families for c in f.__subclasses__()), key=lambda c: c.code)}
