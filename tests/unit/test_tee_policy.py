"""tee_policy: what is refused, and that writing and reading agree; in the access policy, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.access_policy import access_policy_document, parse_access_policy
from oci_hook.errors import BundleInvalid
from oci_hook.tee_policy import ALLOWANCES, LEVELS, TeePolicy, parse_tee_policy, tee_policy_document
from tests.bundles import value_or_none
from tests.unit.test_access_policy import GOOD as ACCESS

GOOD: dict[str, Any] = {
    "kind": "sev-snp",
    "measurements": ["ab" * 48, "cd" * 48],
    "roots": ["ef" * 32],
    "minimum_tcb": {"milan": {"bootloader": 4, "snp": 22, "microcode": 213}, "turin": {"fmc": 1, "tee": 0}},
    "vmpl": 2,
    "allow": ["debug"],
    "vlek_providers": ["cloud-1"],
}


def test_a_full_policy() -> None:
    policy = parse_tee_policy(copy.deepcopy(GOOD), error=BundleInvalid)
    assert policy == TeePolicy(
        measurements=(b"\xab" * 48, b"\xcd" * 48),
        roots=(b"\xef" * 32,),
        minimum_tcb={"milan": {"bootloader": 4, "snp": 22, "microcode": 213}, "turin": {"fmc": 1, "tee": 0}},
        vmpl=2,
        allow=("debug",),
        vlek_providers=("cloud-1",),
    )
    assert tee_policy_document(policy) == GOOD


def test_what_is_absent_is_forbidden() -> None:
    policy = parse_tee_policy({name: GOOD[name] for name in ("kind", "measurements", "roots")}, error=BundleInvalid)
    assert (policy.minimum_tcb, policy.vmpl, policy.allow, policy.vlek_providers) == ({}, 0, (), ())
    assert tee_policy_document(policy) == {name: GOOD[name] for name in ("kind", "measurements", "roots")}


@pytest.mark.parametrize("missing", ["kind", "measurements", "roots"])
def test_required_parts(missing: str) -> None:
    with pytest.raises(BundleInvalid, match=missing):
        parse_tee_policy({name: part for name, part in GOOD.items() if name != missing}, error=BundleInvalid)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "tdx"},
        {"kind": "SEV-SNP"},
        {"kind": None},
        {"measurements": []},
        {"measurements": ["ab" * 32]},
        {"measurements": ["AB" * 48]},
        {"measurements": ["ab" * 48] * 2},
        {"measurements": [f"{number:096x}" for number in range(65)]},
        {"measurements": "ab" * 48},
        {"roots": []},
        {"roots": ["ef" * 31]},
        {"roots": [f"{number:064x}" for number in range(17)]},
        {"minimum_tcb": {}},
        {"minimum_tcb": {"milan": {}}},
        {"minimum_tcb": {"rome": {"snp": 1}}},
        {"minimum_tcb": {"Milan": {"snp": 1}}},
        {"minimum_tcb": {"milan": {"fmc": 1}}},
        {"minimum_tcb": {"milan": {"snp": 256}}},
        {"minimum_tcb": {"milan": {"snp": -1}}},
        {"minimum_tcb": {"milan": {"snp": True}}},
        {"minimum_tcb": {"milan": {"spl4": 0}}},
        {"minimum_tcb": {"milan": 3}},
        {"minimum_tcb": None},
        {"vmpl": 4},
        {"vmpl": -1},
        {"vmpl": False},
        {"allow": []},
        {"allow": ["smt"]},
        {"allow": ["debug", "debug"]},
        {"vlek_providers": []},
        {"vlek_providers": [""]},
        {"vlek_providers": ["x" * 65]},
        {"vlek_providers": ["a\nb"]},
        {"insecure": True},
    ],
)
def test_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleInvalid):
        parse_tee_policy({**copy.deepcopy(GOOD), **changes}, error=BundleInvalid)


@pytest.mark.parametrize("value", [None, [], "sev-snp", True, {}])
def test_no_object(value: object) -> None:
    with pytest.raises(BundleInvalid):
        parse_tee_policy(value, error=BundleInvalid)


def test_in_the_access_policy() -> None:
    whole = {**copy.deepcopy(ACCESS), "tee": copy.deepcopy(GOOD)}
    policy = parse_access_policy(copy.deepcopy(whole), error=BundleInvalid)
    assert policy.tee == parse_tee_policy(GOOD, error=BundleInvalid)
    assert access_policy_document(policy) == whole
    assert parse_access_policy(copy.deepcopy(ACCESS), error=BundleInvalid).tee is None
    for bad in (None, {}, False, []):  # none of them reads as "not asked for"
        with pytest.raises(BundleInvalid):
            parse_access_policy({**copy.deepcopy(ACCESS), "tee": bad}, error=BundleInvalid)


POLICY = st.builds(
    TeePolicy,
    measurements=st.lists(st.binary(min_size=48, max_size=48), min_size=1, max_size=4, unique=True).map(tuple),
    roots=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4, unique=True).map(tuple),
    minimum_tcb=st.dictionaries(
        st.sampled_from(["milan", "genoa"]),
        st.dictionaries(st.sampled_from(LEVELS[1:]), st.integers(0, 255), min_size=1),
        max_size=2,
    ),
    vmpl=st.integers(0, 3),
    allow=st.lists(st.sampled_from(ALLOWANCES), unique=True).map(tuple),
    vlek_providers=st.lists(st.text("az-9", min_size=1, max_size=8), max_size=3, unique=True).map(tuple),
)


@given(POLICY)
def test_writing_and_reading_agree(policy: TeePolicy) -> None:
    assert parse_tee_policy(tee_policy_document(policy), error=BundleInvalid) == policy


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "milan"]), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(list(GOOD)), VALUE)
def test_any_value(name: str, value: object) -> None:
    policy = value_or_none(
        lambda: parse_tee_policy({**copy.deepcopy(GOOD), name: value}, error=BundleInvalid), BundleInvalid
    )
    assert policy is None or tee_policy_document(policy).get(name, 0) == value
