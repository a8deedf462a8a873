"""Kubernetes and SPIFFE tokens, through podman, hook and TPM, with what an orchestrator would bring set by hand.

No cluster runs here. A container gets the annotations that CRI-O sets and a token below a path as the kubelet makes it
(`…/pods/<uid>/volumes/kubernetes.io~projected/<volume>/token`, a link through `..data`), and the configuration names
CRI-O as the engine. It proves the hook's half: what a kubelet writes is not shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from oci_hook.jws import public_jwk, sign_token
from tests.integration.test_start import changed, model_mounts, refused, start, tpm_handles
from tests.scene import AUDIENCE, Scene

CLUSTER, DOMAIN = "https://kubernetes.default.svc", "https://spire.example"
POD, OTHER_POD = "6f1b3c1e-30f5-4dd8-9a2b-0b1f2f6c7d10", "11111111-30f5-4dd8-9a2b-0b1f2f6c7d10"
ACCOUNT, WORKLOAD = "system:serviceaccount:shop:recommender", "spiffe://spire.example/shop/recommender"
KEY = ec.generate_private_key(ec.SECP256R1())
MODEL = "orchestrated:1"


@pytest.fixture(scope="module", autouse=True)
def orchestrated(scene: Scene, model_source: Path) -> None:
    """A model for a service account and for a SPIFFE id, and the two issuers, trusted."""
    access = scene.owner / "access.json"
    identities = [
        {"issuer": CLUSTER, "audience": AUDIENCE, "subjects": [ACCOUNT]},
        {"issuer": DOMAIN, "audience": AUDIENCE, "subjects": [WORKLOAD]},
    ]
    access.write_text(json.dumps({"identities": identities, "token_age_seconds": 3600, "share": False}))
    out = scene.usb / "orchestrated"
    out.mkdir()
    scene.sczctl("pack", model_source, "-o", out / "bundle", "--keys", scene.owner / "keys", "--name", "orchestrated",
                 "--version", "1", "--access", access)  # fmt: skip
    scene.grant(out, name="orchestrated")
    scene.add(out)
    jwks = scene.host / "jwks.json"
    jwks.write_text(json.dumps({"keys": [{**public_jwk(KEY.public_key()), "kid": "k1", "alg": "ES256", "use": "sig"}]}))
    for name, issuer, kind in (("cluster", CLUSTER, "kubernetes"), ("spire", DOMAIN, "spiffe")):
        scene.sczctl("trust", "add", "issuer", jwks, "--name", name, "--issuer", issuer, "--type", kind)


def token(**claims: object) -> bytes:
    now = int(time.time())
    whole = {"aud": [AUDIENCE], "iat": now, "exp": now + 600, "jti": os.urandom(8).hex(), **claims}
    return sign_token(whole, kid="k1", key=KEY, algorithm="ES256")


def service_account(pod: str) -> bytes:
    claims = {
        "namespace": "shop",
        "serviceaccount": {"name": "recommender", "uid": "u"},
        "pod": {"name": "p", "uid": pod},
    }
    return token(iss=CLUSTER, sub=ACCOUNT, **{"kubernetes.io": claims})


def projected(scene: Scene, pod: str, data: bytes) -> Path:
    """A volume as the kubelet projects it; returns its folder."""
    volume = scene.host / "kubelet" / "pods" / pod / "volumes" / "kubernetes.io~projected" / "scz-token"
    (volume / "..2026_01_01").mkdir(parents=True, exist_ok=True)
    (volume / "..2026_01_01" / "token").write_bytes(data)
    for link, target in (("..data", "..2026_01_01"), ("token", "..data/token")):
        if not (volume / link).is_symlink():
            (volume / link).symlink_to(target)
    return volume


@contextlib.contextmanager
def cri_o(scene: Scene) -> Iterator[None]:
    """Root says, in the configuration and in each hook's command line, that CRI-O calls."""
    with contextlib.ExitStack() as stack:
        for path in (scene.config, *scene.hooks.glob("*.json")):
            stack.enter_context(changed(path, lambda data: data.replace(b'"podman"', b'"cri-o"')))
        yield


def labels(pod: str) -> dict[str, str]:
    return {"io.kubernetes.cri-o.Labels": json.dumps({"io.kubernetes.pod.uid": pod})}


def mount(volume: Path) -> tuple[str, ...]:
    return ("--volume", f"{volume}:/var/run/secrets/scz-smm:ro")


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_service_account_token_of_the_pod_itself(scene: Scene, runtime: str) -> None:
    volume = projected(scene, POD, service_account(POD))
    with cri_o(scene):
        attempt = start(scene, None, model=MODEL, runtime=runtime, annotations=labels(POD), options=mount(volume),
                        command="ls /models/orchestrated")  # fmt: skip
        assert attempt.returncode == 0, attempt
        assert "weights.safetensors" in attempt.stdout
        # The same token once more, while nothing binds it to a container: a pod may have several.
        assert start(scene, None, model=MODEL, annotations=labels(POD), options=mount(volume)).returncode == 0
    assert model_mounts(scene) == []
    assert tpm_handles(scene) == ""


@pytest.mark.parametrize("wrong", ["claim", "engine", "path", "no engine"])
def test_claim_engine_and_path_must_name_one_pod(scene: Scene, wrong: str) -> None:
    data = service_account(OTHER_POD if wrong == "claim" else POD)
    volume = projected(scene, OTHER_POD if wrong == "path" else POD, data)
    said = labels(OTHER_POD if wrong == "engine" else POD)
    if wrong == "no engine":  # under podman nobody but the container's creator set that annotation
        refused(scene, "TokenBoundElsewhere", None, model=MODEL, annotations=said, options=mount(volume))
        return
    with cri_o(scene):
        refused(scene, "TokenBoundElsewhere", None, model=MODEL, annotations=said, options=mount(volume))


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_spiffe_token(scene: Scene, runtime: str) -> None:
    path = scene.host / "svid"
    path.write_bytes(token(iss=DOMAIN, sub=WORKLOAD))
    attempt = start(scene, path, model=MODEL, runtime=runtime, command="ls /models/orchestrated")
    assert attempt.returncode == 0, attempt
    assert "weights.safetensors" in attempt.stdout
    path.write_bytes(token(iss=DOMAIN, sub="spiffe://elsewhere.example/shop/recommender"))
    refused(scene, "TokenClaimsRefused", path, model=MODEL, runtime=runtime)
    path.write_bytes(token(iss=DOMAIN, sub="spiffe://spire.example/shop/mailer"))
    refused(scene, "IdentityRefused", path, model=MODEL, runtime=runtime)


def test_a_token_by_a_key_that_is_not_the_issuer_s(scene: Scene) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    now = int(time.time())
    claims = {"iss": DOMAIN, "sub": WORKLOAD, "aud": AUDIENCE, "iat": now, "exp": now + 600}
    path = scene.host / "swapped"
    path.write_bytes(sign_token(claims, kid="k1", key=other, algorithm="ES256"))
    refused(scene, "TokenSignatureRefused", path, model=MODEL)
