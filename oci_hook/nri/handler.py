"""What a plugin does: the methods that the engine's calls end in. The wire is `connection`'s and `calls`'."""

from __future__ import annotations

from collections.abc import Sequence

from oci_hook.nri.messages import Adjustment, Container, PodSandbox, Settings


class Handler:
    """What a plugin does. A subclass overrides what it wants to hear of; it is subscribed to that and to nothing else.

    Methods are called in threads: one at a time for one container, several at once for several. An exception is the
    engine's answer to that one call and nothing more: a `SczError` with its code, message and remedy, anything else
    as an internal error. Of `create_container` and the pod's, the engine makes a failure of the container or the pod;
    of the others it writes it down.
    """

    def configure(self, settings: Settings) -> None:
        """The engine took the plugin; nothing else is called before. An exception: the engine ends the connection."""

    def synchronize(self, pods: Sequence[PodSandbox], containers: Sequence[Container]) -> None:
        """All pods and containers that exist, once after `configure`; events follow. Calls that came over an earlier
        connection may still be under way in their containers' lanes."""

    def run_pod_sandbox(self, pod: PodSandbox) -> None:
        """A pod's sandbox was made."""

    def stop_pod_sandbox(self, pod: PodSandbox) -> None:
        """A pod's sandbox is stopped."""

    def remove_pod_sandbox(self, pod: PodSandbox) -> None:
        """A pod's sandbox was removed."""

    def create_container(self, pod: PodSandbox, container: Container, deadline: float) -> Adjustment | None:
        """A container is about to be created.

        Args:
            pod: Its pod.
            container: What the engine is about to create.
            deadline: `time.monotonic()` at which the engine goes on without the plugin: what is not answered before is
                answered with an error, and `create_container_lost` is called.

        Returns:
            What is to be added; None for nothing.
        """

    def create_container_lost(self, pod: PodSandbox, container: Container) -> None:
        """What `create_container` returned did not reach the engine in time: whatever it made has to go. The container
        may exist without it."""

    def post_create_container(self, pod: PodSandbox, container: Container) -> None:
        """A container was created in the engine; its process does not exist yet (containerd) or does (CRI-O)."""

    def start_container(self, pod: PodSandbox, container: Container) -> None:
        """A container's process exists and is about to be started."""

    def post_start_container(self, pod: PodSandbox, container: Container) -> None:
        """A container was started."""

    def stop_container(self, pod: PodSandbox, container: Container) -> None:
        """A container is stopped, has ended, or failed to be created."""

    def remove_container(self, pod: PodSandbox, container: Container) -> None:
        """A container was removed, or failed to be created."""

    def shutdown(self) -> None:
        """The engine goes down."""
