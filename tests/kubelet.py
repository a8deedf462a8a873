"""What a kubelet puts on a node for a pod, made for the tests: projected tokens and volumes, where it would make them.

No kubelet runs. Paths, links and claims have the shape that Kubernetes documents: `pods/<uid>/volumes/<plugin>/<name>`,
files behind `..data`, the pod's name and uid in the claim `kubernetes.io` (Kubernetes, "Managing Service Accounts",
"Projected Volumes"; `pkg/volume/util/atomic_writer.go`).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.jws import public_jwk, sign_token
from tests.engines import SYSTEM_PATH
from tests.scene import AUDIENCE, Scene

ISSUER = "https://kubernetes.default.svc"
SERVICE_ACCOUNT = "system:serviceaccount:shop:recommender"
MODEL = "pods:1"
_MODEL_NAME = MODEL.partition(":")[0]


class Kubelet:
    """A node's kubelet and its cluster's token issuer, as far as a model's start looks at them.

    Args:
        scene: Its host; the cluster becomes a trusted issuer there, and `MODEL` a model for the service account.
        model_source: The model's plaintext.
    """

    def __init__(self, scene: Scene, model_source: Path) -> None:
        self.folder = scene.host / "kubelet" / "pods"
        self._key = ec.generate_private_key(ec.SECP256R1())
        jwk = {**public_jwk(self._key.public_key()), "kid": "cluster-1", "alg": "ES256", "use": "sig"}
        jwks, access = scene.host / "cluster.json", scene.owner / "pods.json"
        jwks.write_text(json.dumps({"keys": [jwk]}))
        scene.sczctl("trust", "add", "issuer", jwks, "--name", "cluster", "--issuer", ISSUER, "--type", "kubernetes")
        identities = [{"issuer": ISSUER, "audience": AUDIENCE, "subjects": [SERVICE_ACCOUNT]}]
        access.write_text(json.dumps({"identities": identities, "token_age_seconds": 3600, "share": False}))
        out = scene.usb / _MODEL_NAME
        out.mkdir()
        words = ["--keys", scene.owner / "keys", "--name", _MODEL_NAME, "--version", "1", "--access", access]
        scene.sczctl("pack", model_source, "-o", out / "bundle", *words)
        scene.grant(out, name=_MODEL_NAME)
        scene.add(out)

    def token(self, pod: str) -> bytes:
        """A token that the cluster issued to the service account, for a pod's uid."""
        now = int(time.time())
        account = {"name": "recommender", "uid": "8b7f6c54-0000-4000-8000-000000000001"}
        claims = {
            "iss": ISSUER,
            "sub": SERVICE_ACCOUNT,
            "aud": [AUDIENCE],
            "iat": now,
            "nbf": now,
            "exp": now + 600,
            "jti": os.urandom(8).hex(),
            "kubernetes.io": {"namespace": "shop", "serviceaccount": account, "pod": {"name": "shop", "uid": pod}},
        }
        return sign_token(claims, kid="cluster-1", key=self._key, algorithm="ES256")

    def project(self, pod: str, data: bytes) -> Path:
        """A projected volume of the pod's with the token in it; returns the volume."""
        volume = self.folder / pod / "volumes" / "kubernetes.io~projected" / "scz-token"
        version = volume / time.strftime("..%Y_%m_%d_%H_%M_%S.0000000001", time.gmtime())
        version.mkdir(parents=True)
        (version / "token").write_bytes(data)
        (volume / "..data").symlink_to(version.name)
        (volume / "token").symlink_to("..data/token")
        return volume

    @contextmanager
    def memory_volume(self, pod: str, name: str, *, prefix: Sequence[str] = ()) -> Iterator[Path]:
        """An emptyDir with `medium: Memory`: a tmpfs below the pod's folder, shared as a host's mounts are.

        Args:
            pod: The pod's uid.
            name: The volume's.
            prefix: Words before a command that enter the engine's mount namespace.
        """
        volume = self.folder / pod / "volumes" / "kubernetes.io~empty-dir" / name
        volume.mkdir(parents=True)
        commands = [["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(volume)]]
        commands += [["mount", "--make-shared", str(volume)]]
        for command in commands:
            subprocess.run([*prefix, *command], env={"PATH": SYSTEM_PATH}, check=True)
        try:
            yield volume
        finally:
            subprocess.run([*prefix, "umount", str(volume)], env={"PATH": SYSTEM_PATH}, check=True)
