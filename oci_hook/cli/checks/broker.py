"""The key broker of [broker]: whether it can be reached over a TLS connection that holds, and is unsealed."""

from __future__ import annotations

from collections.abc import Iterator

from oci_hook.attestation.deadline import with_deadline
from oci_hook.broker import WHAT, broker_endpoint, open_client
from oci_hook.cli.checks.check import Check, failed
from oci_hook.config import Config
from oci_hook.errors import InternalError, SczError, TpmTimeout
from oci_hook.openbao import OpenBao, describe_status

_SECONDS = 10
_UNSEAL = "`bao operator unseal` on the broker, or look at its log; models that need its share do not start meanwhile"


def check_broker(config: Config) -> Iterator[Check]:
    """One line, if the configuration names a broker; it is told nothing, and asked for its health alone."""
    if not config.broker_address:
        return
    seconds = min(config.broker_timeout_seconds, _SECONDS)
    try:
        endpoint = broker_endpoint(config)

        def ask() -> bytes:
            with open_client(endpoint, seconds) as client:
                return OpenBao(client).health().to_bytes(2, "big")

        status = int.from_bytes(with_deadline(ask, seconds), "big")
    except TpmTimeout:
        message = f"{WHAT} at {config.broker_address} did not answer within {seconds} s"
        yield Check("broker", "fail", message, "look whether it runs, and at the network between")
    except InternalError:
        yield Check("broker", "fail", f"the process that asks {WHAT} ended early", "`sczctl doctor` again")
    except SczError as error:
        yield failed("broker", error)
    else:
        if status == 200:
            yield Check("broker", "ok", f"{endpoint.address} answers, is unsealed, and its certificate is accepted")
        else:
            yield Check("broker", "fail", f"{endpoint.address} {describe_status(status)}", _UNSEAL)
