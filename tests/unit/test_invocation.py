"""`invocation`: the command line that `sczctl` and the shim write is the one that the hook reads, and no other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.hook import main
from oci_hook.invocation import ENGINES, NO_DIGEST, STAGES, Invocation, parse_invocation

TEXT = st.text(max_size=40)


@given(
    st.sampled_from(STAGES),
    st.sampled_from([None, *ENGINES]),
    st.dictionaries(TEXT.filter(lambda key: "=" not in key), TEXT, max_size=4),
    st.sampled_from([None, NO_DIGEST, "a" * 64]),
)
def test_what_is_written_is_read(stage: str, engine: str | None, requests: dict[str, str], digest: str | None) -> None:
    written = Invocation(stage, config_file="/c", engine=engine, requests=requests, spec_digest=digest)
    command = written.command()
    assert command[1:3] == ["-I", "-S"]
    assert command[3].endswith("/oci_hook/launch.py")
    read = parse_invocation(command[4:])
    assert read is not None
    assert all(getattr(read, name) == getattr(written, name) for name in Invocation.__slots__)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["start"],
        ["prestart", "poststop"],
        ["--config", "prestart"],
        ["--engine", "lxc", "prestart"],
        ["--engine", "podman", "--engine", "podman", "prestart"],
        ["--config", "/a", "--config", "/b", "prestart"],
        ["--request", "smm.scz/model", "prestart"],
        ["--request", "smm.scz/model=a", "--request", "smm.scz/model=b", "prestart"],
        ["--trust-me", "yes", "prestart"],
        ["prestart", "--engine", "podman"],
    ],
)
def test_another_form_is_refused_before_the_state_is_read(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse_invocation(arguments) is None
    assert main(arguments) == 10
    assert capsys.readouterr().err.startswith("usage: ")
