"""Every way in which this project says no, with its exit code and its remedy.

crun, and podman's precreate, show an operator nothing but a hook's exit code, so each reason has a number of its own
and ``sczctl why`` turns the number back into words. Three families, by what is known:
* 10-29 **input**: what we were given cannot be used (state, configuration, annotation, file).
* 30-59 **refused**: it was checked, and it is false.
* 60-79 **could not tell**: a TPM, a system call or the network gave no answer.
Every one of them ends the container before it runs. Standard library only: the hook's fast path imports this module.
"""

from __future__ import annotations

from typing import ClassVar


class SczError(Exception):
    """The base of all errors that this project raises on purpose.

    Args:
        message: The check that failed and what was seen; never a key, a token, a nonce or a part of one.
        remedy: One line that names the command or file that mends it; the class's own if absent.
    """

    code: ClassVar[int] = 70
    family: ClassVar[str] = "internal"
    summary: ClassVar[str] = "internal error"
    remedy: ClassVar[str] = "run the command again; if it recurs, report it with the journal's lines"

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.advice = remedy or self.remedy

    @property
    def reason(self) -> str:
        """The class's name, as the audit log and the metrics carry it."""
        return type(self).__name__


class InputError(SczError):
    """What we were given cannot be used."""

    family = "input"


class Refused(SczError):
    """It was checked, and it is false."""

    family = "refused"


class CouldNotTell(SczError):
    """No answer could be had, so the answer is no."""

    family = "could-not-tell"


# --- input, 10-29 -----------------------------------------------------------------------------------------------------


class StateInvalid(InputError):
    code, summary = 10, "the OCI state on standard input cannot be used"
    remedy = "let an OCI runtime call scz-hook; see docs/operations.md"


class SpecInvalid(InputError):
    code, summary = 11, "the container's config.json cannot be used"
    remedy = "look at the bundle's config.json, which the engine writes"


class AnnotationInvalid(InputError):
    code, summary = 12, "an smm.scz/ annotation is unknown or malformed"
    remedy = "correct the annotation; docs/annotations.md lists them"


class ConfigInvalid(InputError):
    code, summary = 13, "the configuration cannot be used"
    remedy = "correct /etc/scz-smm/config.toml; it must belong to root and be writable by root alone"


class ModelUnknown(InputError):
    code, summary = 14, "the model is not in this host's store"
    remedy = "`sczctl list` shows what is there; `sczctl add BUNDLE` adds a model"


class BundleInvalid(InputError):
    code, summary = 15, "the model bundle is malformed"
    remedy = "copy the bundle again from its owner and run `sczctl verify`"


class GrantInvalid(InputError):
    code, summary = 16, "the grant is malformed"
    remedy = "`sczctl add` the owner's grant again; if it is malformed itself, ask for a new one (`sczctl grant`)"


class BootPolicyInvalid(InputError):
    code, summary = 17, "the boot policy is malformed or covers too little"
    remedy = "`sczctl add` the owner's boot policy again, or ask for a new one (`sczctl boot-policy sign`)"


class TokenMissing(InputError):
    code, summary = 18, "the container has no identity token"
    remedy = "mount a token into the container (`sczctl token issue`, or a projected volume); see smm.scz/token"


class TokenMalformed(InputError):
    code, summary = 19, "the identity token is malformed"
    remedy = "issue a new token; it must be one JWS in compact form, at most 16 KiB"


class TrustInvalid(InputError):
    code, summary = 20, "a trusted owner's or issuer's file is malformed"
    remedy = "remove it and add it again with `sczctl trust`"


class DestinationInvalid(InputError):
    code, summary = 21, "the model's path in the container cannot be used"
    remedy = "choose another smm.scz/path: absolute, not a file, not through a symbolic link"


class DeviceInvalid(InputError):
    code, summary = 22, "a device record or enrolment message cannot be used"
    remedy = "enrol again, beginning with `sczctl enroll request`"


class StoreInvalid(InputError):
    code, summary = 23, "an entry of the host's store is damaged"
    remedy = "`sczctl add FOLDER` again, with what the model's owner sent: it mends the entry; `sczctl rm` removes it"


class KeyInvalid(InputError):
    code, summary = 24, "an owner's key cannot be opened"
    remedy = "check the folder given with --keys and its passphrase"


class EngineUnsupported(InputError):
    code, summary = 25, "the engine or option is not supported by this version"
    remedy = "see docs/runtimes.md for what is supported"


class OutputExists(InputError):
    code, summary = 26, "the output already exists"
    remedy = "choose another output, or remove what is there"


class SourceInvalid(InputError):
    code, summary = 27, "the model's source folder cannot be packed"
    remedy = "give a folder of regular files; names are UTF-8, at most 255 bytes a part"


# --- refused, 30-59 ---------------------------------------------------------------------------------------------------


class OwnerUntrusted(Refused):
    code, summary = 30, "the manifest is not signed by an owner whom this host trusts"
    remedy = "`sczctl trust list` shows the owners; `sczctl trust add owner FILE` adds one"


class BundleMismatch(Refused):
    code, summary = 31, "the bundle's contents are not what its owner signed"
    remedy = "copy the bundle again and `sczctl add` it: that mends the store; if it recurs, tell the model's owner"


class GrantRefused(Refused):
    code, summary = 32, "the grant is not for this device, this model or from this owner"
    remedy = "ask the model's owner for a grant to this device (`sczctl grant`)"


class GrantMissing(Refused):
    code, summary = 33, "this device has no grant for the model"
    remedy = "ask the model's owner for one (`sczctl grant`), then `sczctl add` it"


class BootPolicyRefused(Refused):
    code, summary = 34, "the boot policy is missing, or not signed by the model's owner for this model and device class"
    remedy = "ask the model's owner for a boot policy (`sczctl boot-policy sign`), then `sczctl add` it"


class BootStateRefused(Refused):
    code, summary = 35, "the machine is not booted into a state that the model's owner approved"
    remedy = "boot the approved system, or send `sczctl boot-policy measure` to the owner for a new boot policy"


class EvidenceRefused(Refused):
    code, summary = 36, "the TPM's quote does not prove what was asked"
    remedy = "enrol the device again (`sczctl enroll request`); if it recurs, suspect the TPM's bus"


class TokenSignatureRefused(Refused):
    code, summary = 37, "the identity token's signature is not by a key of its issuer"
    remedy = "issue a new token, or renew the issuer's keys (`sczctl trust add issuer`)"


class TokenExpired(Refused):
    code, summary = 38, "the identity token is expired, too old, or not yet valid"
    remedy = "issue a new token (`sczctl token issue`), then start the container again; check the clock"


class TokenClaimsRefused(Refused):
    code, summary = 39, "a claim of the identity token is missing or false"
    remedy = "issue a token with the audience and lifetime that the model's access policy names"


class IdentityRefused(Refused):
    code, summary = 40, "the model's access policy does not name this workload"
    remedy = "run the workload whose identity the owner named, or ask the owner to name this one"


class TokenBoundElsewhere(Refused):
    code, summary = 41, "the identity token belongs to another container or pod"
    remedy = "issue a token of its own for each container (`sczctl token issue`)"


class IssuerUntrusted(Refused):
    code, summary = 42, "the identity token's issuer is not trusted here or not pinned by the model's owner"
    remedy = "`sczctl trust list` shows the issuers; `sczctl trust add issuer FILE` adds one"


class Revoked(Refused):
    code, summary = 43, "the grant was revoked on this device"
    remedy = "ask the model's owner for a new grant (`sczctl grant`)"


class KeyRefused(Refused):
    code, summary = 44, "the TPM did not release the key, or the key does not open the grant"
    remedy = "ask the model's owner for a new grant to this device (`sczctl grant`)"


class DecryptionRefused(Refused):
    code, summary = 45, "an encrypted file was changed, truncated, extended or swapped"
    remedy = "`sczctl add FOLDER` again, with what the model's owner sent: it mends the store"


class DestinationRefused(Refused):
    code, summary = 46, "the model's path would lead outside the container or show the model to others"
    remedy = "choose an smm.scz/path that is not in a volume; an own tmpfs is allowed"


class HolderRefused(Refused):
    code, summary = 47, "the process that holds the container's root file system is not recognised"
    remedy = "use a runtime that docs/runtimes.md lists"


class MemoryRefused(Refused):
    code, summary = 48, "the model does not fit into the container's memory limit or the node's reserve"
    remedy = "raise the container's memory limit, or free memory on the node"


class RequirementRefused(Refused):
    code, summary = 49, "this host cannot give what smm.scz/require or the access policy asks"
    remedy = "run the container where the requirement holds; `sczctl why` names it"


class ClockRefused(Refused):
    code, summary = 50, "the clock is earlier than the last audit record"
    remedy = "set the clock, start the container again; if the record is wrong, move the log's files out of its folder"


class AccessWindowRefused(Refused):
    code, summary = 51, "the model's access policy does not allow it at this date"
    remedy = "ask the model's owner for a new version of the model with other dates"


class EnrolmentRefused(Refused):
    code, summary = 52, "the device failed a check of the enrolment"
    remedy = "the message names the check; a software TPM needs its CA in the owner's --ek-roots folder"


class TokenAlgorithmRefused(Refused):
    code, summary = 53, "the identity token's algorithm is not accepted"
    remedy = "use RS256, RS384, RS512, ES256, ES384 or ES512"


class AuditRefused(Refused):
    code, summary = 54, "the audit log's chain is broken"
    remedy = "`sczctl audit verify` names the line; move the log's files out of its folder, and keep them"


# --- could not tell, 60-79 --------------------------------------------------------------------------------------------


class TpmUnavailable(CouldNotTell):
    code, summary = 60, "the TPM cannot be reached"
    remedy = "check `tpm.tcti` in the configuration and that the TPM is on"


class TpmTimeout(CouldNotTell):
    code, summary = 61, "the TPM or its lock did not answer in time"
    remedy = "start the container again; raise `tpm.timeout_seconds` for a slow TPM"


class TpmFailed(CouldNotTell):
    code, summary = 62, "a TPM command failed"
    remedy = "see the response code; `tpm2_rc_decode CODE` explains it"


class TpmLockout(CouldNotTell):
    code, summary = 63, "the TPM is in dictionary-attack lockout"
    remedy = "wait, or clear it with `tpm2_dictionarylockout --clear-lockout`"


class SystemCallFailed(CouldNotTell):
    code, summary = 64, "a system call failed"
    remedy = "the message names the call and the error; the hook needs root and Linux 5.12 or later"


class AuditFailed(CouldNotTell):
    code, summary = 65, "the audit record cannot be written"
    remedy = "free space in the audit log's file system and check its owner"


class HolderGone(CouldNotTell):
    code, summary = 66, "the container's process ended or changed while the hook ran"
    remedy = "start the container again"


class WriterFailed(CouldNotTell):
    code, summary = 67, "the process that decrypts into memory ended early"
    remedy = "raise the container's memory limit (the kernel may have ended it), then start it again"


class FileUnreadable(CouldNotTell):
    code, summary = 68, "a file cannot be read or written"
    remedy = "the message names the file and the error"


class DeviceNotEnrolled(CouldNotTell):
    code, summary = 69, "this host is not enrolled"
    remedy = "enrol it: `sczctl enroll request --owner OWNER.json`"


class InternalError(CouldNotTell):
    code, summary = 70, "internal error"
    remedy = "run it again; if it recurs, report it with the journal's lines"


class Terminated(CouldNotTell):
    code, summary = 71, "the hook was told to end before it was done"
    remedy = "raise the hook's timeout in its hooks.d file for a very large model"


class InstallationIncomplete(CouldNotTell):
    code, summary = 72, "the installation of scz-smm is incomplete, or being changed right now"
    remedy = "`dpkg --configure -a`, `apt install --reinstall scz-smm`; with rpm: `rpm -U --replacepkgs FILE`"
