"""The broker's share of a wrapping key: the hook's side. OpenBao or Vault gives it against the container's own token.

The whole exchange runs in a forked process with one deadline, from the resolver to the last byte, which is killed when
time is up; what comes back is 32 bytes or one of our errors. The token is sent only after the TPM has released its
secret, so the broker's log of decryptions is one of models that were opened; the connection is made meanwhile (ADR 23).
There is no way round it: where the owner asked for two shares, one opens nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType, TracebackType

from oci_hook.attestation.deadline import Deadline, Standby
from oci_hook.bundle.broker_share import share_context
from oci_hook.bundle.grant import Grant
from oci_hook.config import Config
from oci_hook.errors import ConfigInvalid, InternalError, TpmTimeout
from oci_hook.https_client import AUTHORITIES_LIMIT_BYTES, Endpoint, HttpsClient, parse_endpoint
from oci_hook.key_errors import BrokerUnavailable
from oci_hook.openbao import ANSWER_LIMIT_BYTES, OpenBao
from oci_hook.trusted_file import load_root_file

WHAT = "the key broker"
_IDLE_SECONDS = 5.0  # OpenBao closes a connection that is silent for 10 s
_REVOKE_SECONDS = 1.0  # to give a client token back, which ends by itself soon: the share is worth more


@dataclass(frozen=True, slots=True)
class ContainerAtBroker:
    """A container that asks this host's broker: the configuration names the way, the token is the container's own.

    `standby`: the child for the TPM, if there is one: the broker's process holds no end of its pipes.
    """

    config: Config
    token: bytes = field(repr=False)
    standby: Standby | None = None

    def begin(self, grant: Grant) -> ShareRequest | None:
        """Connect to the broker, if the grant has a share there; nothing is sent yet.

        Raises:
            ConfigInvalid: The configuration names no usable broker.
            CouldNotTell: The file with its authorities cannot be read, or there is no process for it.
        """
        if grant.broker is None:
            return None
        endpoint = broker_endpoint(self.config)
        return ShareRequest(self._exchange(endpoint, grant), endpoint, self.config.broker_timeout_seconds)

    def _exchange(self, endpoint: Endpoint, grant: Grant) -> Callable[[Callable[[], None]], bytes]:
        share, jwt = grant.broker, self.token.decode("ascii")
        context = share_context(grant.owner_id, grant.model)

        def exchange(wait: Callable[[], None]) -> bytes:
            if share is None:
                raise InternalError("the grant has no share of a broker")
            if self.standby is not None:
                self.standby.end()  # the copies here: it sees that there are no more requests when all are closed
            with open_client(endpoint, self.config.broker_timeout_seconds) as client:
                client.connect()
                connected = time.monotonic()
                wait()
                began = time.monotonic()
                if began - connected > _IDLE_SECONDS:  # the server may have closed it: connect once more
                    client.close()
                bao = OpenBao(client)
                login = bao.login(share.auth, share.role, jwt)
                try:
                    return bao.decrypt(share.mount, share.key, share.ciphertext, context, login.token)
                finally:
                    if not login.single_use:
                        left = began + self.config.broker_timeout_seconds - time.monotonic()
                        with _given_up_after(min(_REVOKE_SECONDS, left / 2)):
                            bao.revoke(share.auth, login.token)

        return exchange


@contextmanager
def _given_up_after(seconds: float) -> Iterator[None]:
    """Leave the block after so long, wherever it is; for a process of one thread that uses no other alarm."""

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    with suppress(TimeoutError):
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


class ShareRequest:
    """A request for a share that waits, connected, to be told to go on; a context manager that ends it.

    Args:
        exchange: What the child does; it is given what waits for the word.
        endpoint: For messages.
        seconds: For all of it.
    """

    def __init__(self, exchange: Callable[[Callable[[], None]], bytes], endpoint: Endpoint, seconds: float) -> None:
        self._endpoint, self._seconds = endpoint, seconds
        with ExitStack() as stack:
            waiting_fd, self._go_fd = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, waiting_fd)
            go_fd = self._go_fd

            def wait() -> None:
                os.close(go_fd)
                if not os.read(waiting_fd, 1):
                    os._exit(1)  # there is no secret that the share would go with

            try:
                self._deadline = Deadline(lambda: exchange(wait), seconds)
            except BaseException:
                os.close(self._go_fd)
                raise

    def __enter__(self) -> ShareRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._go_fd)
        self._deadline.__exit__(kind, value, trace)

    def result(self) -> bytes:
        """Send the token, and have the share: 32 bytes; once.

        Raises:
            BrokerRefused: The broker says no.
            BrokerUnavailable: It gave no answer that can be used, or none in time.
        """
        self._deadline.count_anew()
        try:
            with suppress(BrokenPipeError):  # it has failed already, and says why
                os.write(self._go_fd, b"+")
            return self._deadline.result()
        except TpmTimeout as cause:
            raise no_answer(self._endpoint, self._seconds) from cause
        except InternalError as cause:
            raise BrokerUnavailable(f"the process that asks {WHAT} ended early") from cause


def open_client(endpoint: Endpoint, seconds: float, *, limit_bytes: int = ANSWER_LIMIT_BYTES) -> HttpsClient:
    """A client for a broker; nothing is opened yet."""
    return HttpsClient(endpoint, what=WHAT, seconds=seconds, limit_bytes=limit_bytes, error=BrokerUnavailable)


def no_answer(endpoint: Endpoint, seconds: float) -> BrokerUnavailable:
    """The error for a broker that took too long."""
    return BrokerUnavailable(f"{WHAT} at {endpoint.address} did not answer within {seconds:g} s")


def broker_endpoint(config: Config) -> Endpoint:
    """The broker of this host's configuration, with its authorities, which root alone can write.

    Raises:
        ConfigInvalid: There is none, or its file is not root's alone.
        FileUnreadable: The file cannot be read.
    """
    verify_broker_named(config)
    authorities = load_root_file(config.broker_ca_file, limit_bytes=AUTHORITIES_LIMIT_BYTES, error=ConfigInvalid)
    return parse_endpoint(config.broker_address, authorities, error=ConfigInvalid)


def verify_broker_named(config: Config) -> None:
    """Check that the configuration names a broker, and an authority for it.

    Raises:
        ConfigInvalid: It does not.
    """
    if not config.broker_address or not config.broker_ca_file:
        raise ConfigInvalid(
            "a broker's share is asked for, and this host's configuration names no broker, or no authority for it",
            remedy="set address and ca_file of [broker] in /etc/scz-smm/config.toml (docs/broker.md)",
        )
