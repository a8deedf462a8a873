"""Remote appraisal by a real verifier of Keylime: what it accepts, what it refuses, and what a start makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.attestation.keylime import PATH, keylime_request
from oci_hook.attestation.structures import Public
from oci_hook.audit import AuditLog
from oci_hook.https_request import Server, request
from oci_hook.key_errors import AppraisalRefused, VerifierUnavailable
from oci_hook.remote_appraisal import ask_keylime
from tests.attestation_vectors import public_of
from tests.integration.test_release import shell
from tests.integration.test_start import start
from tests.kept import APPROVED, CONTAINER, Witness, make_witness
from tests.keylime import keylime_verifier
from tests.scene import AUDIENCE, ISSUER, SUBJECT, Scene
from tests.tls_servers import Authority, response, serving


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Server]:
    with keylime_verifier(tmp_path_factory.mktemp("keylime"), authority) as server:
        yield server


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    return make_witness(tmp_path_factory.mktemp("witness"))


def ask(
    verifier: Server, witness: Witness, *, extra: bytes | None = None, ak: Public | None = None, **pcrs: bytes
) -> None:
    evidence = witness.start()
    reference = {**APPROVED, **{int(name.removeprefix("pcr")): value for name, value in pcrs.items()}}
    ask_keylime(
        verifier,
        evidence.quote,
        ak=ak or public_of(witness.ak),
        extra_data=extra or evidence.qualifying_data(CONTAINER),
        reference=reference,
        timeout_seconds=60,
    )


def test_the_real_verifier_tells_good_from_bad(verifier: Server, witness: Witness, tmp_path: Path) -> None:
    ask(verifier, witness)
    other = make_witness(tmp_path)
    with pytest.raises(AppraisalRefused):
        ask(verifier, witness, extra=bytes(32))
    with pytest.raises(AppraisalRefused):
        ask(verifier, witness, ak=public_of(other.ak))
    for pcr in APPROVED:
        with pytest.raises(AppraisalRefused, match=f"pcr_{pcr}|PCR"):
            ask(verifier, witness, **{f"pcr{pcr}": b"x" * 32})


def test_the_real_verifier_refuses_flipped_quotes(verifier: Server, witness: Witness) -> None:
    good = witness.start()
    for name in ("attest", "signature"):
        data = getattr(good.quote, name)
        for place in (10, len(data) // 2, len(data) - 1):
            flipped = bytearray(data)
            flipped[place] ^= 1
            quote = replace(good.quote, **{name: bytes(flipped)})
            with pytest.raises((AppraisalRefused, VerifierUnavailable)):
                ask_keylime(
                    verifier,
                    quote,
                    ak=public_of(witness.ak),
                    extra_data=good.qualifying_data(CONTAINER),
                    reference=APPROVED,
                    timeout_seconds=60,
                )


def test_the_real_verifier_skips_what_the_policy_leaves_out(verifier: Server, witness: Witness) -> None:
    """Why our request has every PCR: a request without one is accepted whatever that PCR says."""
    good = witness.start()
    body = keylime_request(
        good.quote, ak=public_of(witness.ak), extra_data=good.qualifying_data(CONTAINER), reference=APPROVED
    )
    document = json.loads(body)
    policy = json.loads(document["data"]["tpm_policy"])
    del policy["9"]
    document["data"]["tpm_policy"] = json.dumps(policy)
    answer = request(
        verifier,
        "POST",
        PATH,
        json.dumps(document).encode(),
        {"Content-Type": "application/json"},
        timeout_seconds=60,
        limit_bytes=1 << 18,
        error=VerifierUnavailable,
    )
    assert json.loads(answer.body)["results"]["valid"] is True


@pytest.fixture(scope="module")
def model(scene: Scene, model_source: Path) -> str:
    """A model whose owner wants a remote appraisal."""
    identity = {"issuer": ISSUER, "audience": AUDIENCE, "subjects": [SUBJECT]}
    access = scene.owner / "access.json"
    document = {"identities": [identity], "token_age_seconds": 3600, "share": False, "appraisal": "keylime"}
    access.write_text(json.dumps(document))
    out = scene.usb / "watched-1"
    out.mkdir()
    words = ["--keys", scene.owner / "keys", "--name", "watched", "--version", "1", "--access", access]
    scene.sczctl("pack", model_source, "-o", out / "bundle", *words)
    scene.grant(out, name="watched")
    scene.add(out)
    return "watched:1"


def configure(scene: Scene, authority: Authority, address: str, seconds: int = 60) -> None:
    ca = scene.host / "keylime-ca.pem"
    ca.write_text(authority.pem)
    section = f'[keylime]\naddress = "{address}"\nca_file = "{ca}"\ntimeout_seconds = {seconds}'
    scene.write_config(keylime=section)


def test_a_start_that_the_verifier_accepts(scene: Scene, model: str, verifier: Server, authority: Authority) -> None:
    configure(scene, authority, verifier.address)
    attempt = start(scene, scene.token("accepted"), model=model, command="cat /models/watched/config.json >&2")
    assert (attempt.returncode, attempt.ran) == (0, True), attempt.stderr
    grants = [each for each in AuditLog(str(scene.audit)).records() if each["event"] == "grant"]
    assert grants[-1]["diagnosis"] == "keylime"  # asked by the attested host about itself
    assert start(scene, scene.token("plain")).ran  # nobody wants it of another model
    grants = [each for each in AuditLog(str(scene.audit)).records() if each["event"] == "grant"]
    assert "diagnosis" not in grants[-1]


def test_a_verifier_that_refuses_or_is_not_there_stops_the_start(
    scene: Scene, model: str, authority: Authority
) -> None:
    def saying(text: bytes) -> bytes:
        return response(text)

    no = json.dumps({"code": 200, "results": {"valid": False, "failures": [{"type": "policy"}]}}).encode()
    for data, code in ((saying(no), 58), (saying(b"{}"), 74), (response(b"", "302 Found", "Location: /\r\n"), 74)):

        def handle(connection: object, data: bytes = data) -> None:
            from tests.tls_servers import read_request

            read_request(connection)  # type: ignore[arg-type]
            connection.sendall(data)  # type: ignore[attr-defined]

        with serving(authority.issue("127.0.0.1", file="liar"), handle) as address:
            configure(scene, authority, address)
            attempt = start(scene, scene.token(f"refused-{code}"), model=model)
        assert (attempt.ran, attempt.why["code"]) == (False, code), attempt.stderr
    configure(scene, authority, address)  # nobody listens there any more
    attempt = start(scene, scene.token("nobody"), model=model)
    assert (attempt.ran, attempt.why["code"]) == (False, 74)
    scene.write_config()
    attempt = start(scene, scene.token("unset"), model=model)
    assert (attempt.ran, attempt.why["code"]) == (False, 13)


def test_another_party_asks_for_itself(
    scene: Scene, model: str, verifier: Server, authority: Authority, tmp_path: Path
) -> None:
    scene.write_config()
    with shell(scene, token="for-another") as container:
        scene.sczctl("evidence", container.id, "-o", tmp_path / "evidence")
    ca = tmp_path / "ca.pem"
    ca.write_text(authority.pem)
    words = ["appraise", tmp_path / "evidence", "--keys", scene.owner / "keys", "--json"]
    words += ["--boot-policy", scene.usb / "small-1" / "boot-policy.json", "--keylime-ca", ca, "--keylime"]
    said = json.loads(scene.sczctl(*words, verifier.address).stdout)
    assert any("Keylime" in each for each in said["models"][0]["shown"])
    assert scene.sczctl(*words, "https://127.0.0.1:1", check=False).returncode == 74
