"""`access_policy`: what is refused, and that writing and reading agree. More vectors: `manifest-access-*`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.access_policy import (
    RUNTIMES,
    AcceptedIdentity,
    AccessPolicy,
    access_policy_document,
    parse_access_policy,
)
from oci_hook.errors import BundleInvalid
from tests.bundles import value_or_none

GOOD: dict[str, Any] = {
    "identities": [
        {"issuer": "https://a", "audience": "scz-smm", "subjects": ["system:serviceaccount:ml:app", "spiffe://x/y"]},
        {"issuer": "https://b", "audience": "x", "subjects": ["auth0|7 é"], "keys": ["A" * 43]},
    ],
    "token_age_seconds": 600,
    "not_before": 10,
    "not_after": 20,
    "runtimes": ["runc", "kata"],
    "share": False,
}


def test_a_full_policy() -> None:
    policy = parse_access_policy(copy.deepcopy(GOOD), error=BundleInvalid)
    assert policy == AccessPolicy(
        identities=(
            AcceptedIdentity("https://a", "scz-smm", ("system:serviceaccount:ml:app", "spiffe://x/y"), ()),
            AcceptedIdentity("https://b", "x", ("auth0|7 é",), ("A" * 43,)),
        ),
        token_age_seconds=600,
        not_before=10,
        not_after=20,
        runtimes=("runc", "kata"),
        share=False,
    )
    assert access_policy_document(policy) == GOOD


def test_optional_parts_may_be_absent() -> None:
    value = {name: GOOD[name] for name in ("identities", "token_age_seconds", "share")}
    policy = parse_access_policy(copy.deepcopy(value), error=BundleInvalid)
    assert (policy.not_before, policy.not_after, policy.runtimes) == (None, None, ())
    assert access_policy_document(policy) == value


def test_a_policy_that_asks_for_a_broker() -> None:
    policy = parse_access_policy({**copy.deepcopy(GOOD), "broker": True}, error=BundleInvalid)
    assert policy.broker
    assert access_policy_document(policy) == {**GOOD, "broker": True}
    assert not parse_access_policy({**copy.deepcopy(GOOD), "broker": False}, error=BundleInvalid).broker


def test_a_remote_appraisal_is_asked_for_by_name() -> None:
    policy = parse_access_policy({**copy.deepcopy(GOOD), "appraisal": "keylime"}, error=BundleInvalid)
    assert policy.appraisal == "keylime"
    assert access_policy_document(policy) == {**GOOD, "appraisal": "keylime"}
    for other in ("", "Keylime", "none", True, None, ["keylime"]):
        with pytest.raises(BundleInvalid):
            parse_access_policy({**copy.deepcopy(GOOD), "appraisal": other}, error=BundleInvalid)


@pytest.mark.parametrize("missing", ["identities", "token_age_seconds", "share"])
def test_required_parts(missing: str) -> None:
    value = {name: part for name, part in GOOD.items() if name != missing}
    with pytest.raises(BundleInvalid):
        parse_access_policy(value, error=BundleInvalid)


@pytest.mark.parametrize(
    "changes",
    [
        {"broker": 1},
        {"broker": "true"},
        {"broker": None},
        {"identities": []},
        {"identities": [{}]},
        {"identities": GOOD["identities"] * 33},
        {"token_age_seconds": 59},
        {"token_age_seconds": 31_622_401},
        {"token_age_seconds": 600.0},
        {"not_before": -1},
        {"not_before": 20},
        {"not_after": None},
        {"runtimes": []},
        {"runtimes": ["runc", "runc"]},
        {"runtimes": ["Runc"]},
        {"runtimes": "runc"},
        {"share": 0},
        {"share": "true"},
        {"insecure": True},
    ],
)
def test_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleInvalid):
        parse_access_policy({**copy.deepcopy(GOOD), **changes}, error=BundleInvalid)


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": ""},
        {"issuer": "a\nb"},
        {"audience": ["x"]},
        {"audience": "x\x7f"},
        {"subjects": []},
        {"subjects": "app"},
        {"subjects": ["a"] * 65},
        {"subjects": ["a", "a"]},
        {"subjects": [1]},
        {"keys": []},
        {"keys": ["A" * 42]},
        {"keys": ["A" * 43, "A" * 43]},
        {"subject": "a"},
    ],
)
def test_refused_identities(changes: dict[str, Any]) -> None:
    value = copy.deepcopy(GOOD)
    value["identities"][0].update(changes)
    with pytest.raises(BundleInvalid):
        parse_access_policy(value, error=BundleInvalid)


LINE = st.text(st.characters(blacklist_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)
IDENTITY = st.builds(
    AcceptedIdentity,
    LINE,
    LINE,
    st.lists(LINE, min_size=1, max_size=4, unique=True).map(tuple),
    st.lists(st.text("AZaz09-_", min_size=43, max_size=43), max_size=3, unique=True).map(tuple),
)
POLICY = st.builds(
    AccessPolicy,
    identities=st.lists(IDENTITY, min_size=1, max_size=3).map(tuple),
    token_age_seconds=st.integers(60, 31_622_400),
    not_before=st.none() | st.integers(0, 1000),
    not_after=st.none() | st.integers(1001, 2000),
    runtimes=st.lists(st.sampled_from(RUNTIMES), unique=True).map(tuple),
    share=st.booleans(),
)


@given(POLICY)
def test_writing_and_reading_agree(policy: AccessPolicy) -> None:
    assert parse_access_policy(access_policy_document(policy), error=BundleInvalid) == policy


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "issuer"]), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(list(GOOD)), VALUE)
def test_any_value(name: str, value: object) -> None:
    policy = value_or_none(
        lambda: parse_access_policy({**copy.deepcopy(GOOD), name: value}, error=BundleInvalid), BundleInvalid
    )
    assert policy is None or access_policy_document(policy)[name] == value
