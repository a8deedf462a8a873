"""Kubernetes without a cluster: what kustomize renders, and admission policies evaluated as an API server does it.

No API server is to be had from Debian or PyPI, so `Policy` does its part: match rules, namespace selector, match
conditions, variables (evaluated when they are used), parameters, validations; an expression that fails refuses
(`failurePolicy: Fail`). Common Expression Language is cel-python's, with Google's RE2 for `matches`; the functions of
Kubernetes' string library that the policies use are here (`_split`, `_replace`, `_substring`). Costs and the API
server's own type checks are not evaluated. kustomize is Debian 13's.
"""

from __future__ import annotations

import copy
import functools
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import celpy
import yaml
from celpy import celtypes
from celpy.evaluation import CELEvalError

from tests.suites import program

FOLDER = Path(__file__).resolve().parents[1] / "config" / "kubernetes"
CUSTOMIZATIONS = ("containerd", "cri-o", "uninstall/containerd", "uninstall/cri-o", "example")
Manifest = dict[str, Any]


@functools.cache
def rendered(name: str) -> tuple[Manifest, ...]:
    """Every manifest that kustomize makes of a folder below config/kubernetes."""
    command = [program("trixie", "kustomize"), "build", FOLDER / name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env={"HOME": "/nonexistent"})
    return tuple(yaml.safe_load_all(done.stdout))


def manifests(path: str) -> list[Manifest]:
    """Those of one file below config/kubernetes, as they are written."""
    return list(yaml.safe_load_all((FOLDER / path).read_text()))


def one(found: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The manifest of that kind and name, for the caller to change."""
    (only,) = (each for each in found if each["kind"] == kind and each["metadata"]["name"] == name)
    return copy.deepcopy(only)


# --- admission --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What an API server has before it when something is written.

    Attributes:
        object: As it would be stored; None for a deletion.
        old: As it was; None for a creation.
        kind: Of the object, if the object does not say: `PodExecOptions`.
    """

    object: Manifest | None
    old: Manifest | None = None
    operation: str = "CREATE"
    subresource: str = ""
    user: str = "alice"
    groups: tuple[str, ...] = ("system:authenticated",)
    extra: Mapping[str, Sequence[str]] | None = None
    namespace_labels: Mapping[str, str] | None = None
    resource: tuple[str, str] = ("", "pods")

    def bindings(self, params: Manifest | None) -> dict[str, Any]:
        """The names that an expression may use."""
        there = self.object or self.old or {}
        metadata = there.get("metadata", {})
        user: Manifest = {"username": self.user, "groups": list(self.groups)}
        if self.extra is not None:
            user["extra"] = {key: list(values) for key, values in self.extra.items()}
        group, _ = self.resource
        request = {
            "kind": {"group": group, "version": "v1", "kind": there.get("kind", "")},
            "operation": self.operation,
            "userInfo": user,
            "name": metadata.get("name", ""),
            "namespace": metadata.get("namespace", ""),
        } | ({"subResource": self.subresource} if self.subresource else {})
        namespace = {"metadata": {"name": metadata.get("namespace", ""), "labels": dict(self.namespace_labels or {})}}
        names = {"object": self.object, "oldObject": self.old, "request": request, "namespaceObject": namespace}
        return {key: celpy.json_to_cel(value) for key, value in {**names, "params": params}.items()}


class _Variables(celtypes.MapType):
    """`variables.NAME`, evaluated when an expression first comes to it."""

    def __init__(self, expressions: Mapping[str, str], bindings: dict[str, Any]) -> None:
        super().__init__()
        self._expressions, self._bindings = expressions, bindings
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: Any) -> Any:
        if name not in self._known:
            self._known[name] = _value(self._expressions[str(name)], {**self._bindings, "variables": self})
        return self._known[name]


class Policy:
    """A ValidatingAdmissionPolicy with its binding.

    Args:
        found: Manifests that have both.
        name: The policy's and the binding's.
    """

    def __init__(self, found: Sequence[Manifest], name: str) -> None:
        self.spec = one(found, "ValidatingAdmissionPolicy", name)["spec"]
        self.binding = one(found, "ValidatingAdmissionPolicyBinding", name)["spec"]
        # Whatever else is said, the API server then refuses; also where it cannot evaluate the policy.
        assert self.spec["failurePolicy"] == "Fail"
        assert self.binding["validationActions"] in (["Deny"], ["Deny", "Audit"])
        self.messages = [each["message"] for each in self.spec["validations"]]
        self._variables = {each["name"]: each["expression"] for each in self.spec.get("variables", [])}

    def matches(self, request: Request) -> bool:
        """Whether the API server asks this policy at all."""
        group, resource = request.resource
        whole = f"{resource}/{request.subresource}" if request.subresource else resource
        selector = self.binding.get("matchResources", {}).get("namespaceSelector", {}).get("matchLabels", {})
        labels = request.namespace_labels or {}
        if any(labels.get(key) != value for key, value in selector.items()):
            return False
        wildcard = f"{resource}/*" if request.subresource else whole
        return any(
            group in rule["apiGroups"]
            and {whole, wildcard} & set(rule["resources"])
            and {request.operation, "*"} & set(rule["operations"])
            for rule in self.spec["matchConstraints"]["resourceRules"]
        )

    def refusals(self, request: Request, params: Manifest | None = None) -> list[str]:
        """The messages of the validations that refuse; none: the request is let through."""
        if not self.matches(request):
            return []
        if "paramRef" in self.binding and params is None:
            assert self.binding["paramRef"]["parameterNotFoundAction"] == "Deny"
            return ["no params found"]
        bindings = request.bindings(params)
        for condition in self.spec.get("matchConditions", []):
            if not _truth(condition["expression"], bindings):
                return []
        bindings["variables"] = _Variables(self._variables, dict(bindings))
        return [each["message"] for each in self.spec["validations"] if not _truth(each["expression"], bindings)]

    def failing(self, request: Request, params: Manifest | None = None) -> list[str]:
        """The messages of validations that refuse because their expression failed, which is never meant."""
        bindings = request.bindings(params)
        bindings["variables"] = _Variables(self._variables, dict(bindings))
        values = {each["message"]: _value(each["expression"], bindings) for each in self.spec["validations"]}
        return [message for message, value in values.items() if not isinstance(value, celtypes.BoolType)]


def _truth(expression: str, bindings: dict[str, Any]) -> bool:
    value = _value(expression, bindings)
    return isinstance(value, celtypes.BoolType) and bool(value)


def _value(expression: str, bindings: dict[str, Any]) -> Any:
    """What an expression gives; an error as a value, as the language has it."""
    try:
        return _program(expression).evaluate(bindings)
    except CELEvalError as error:
        return error
    except (TypeError, IndexError) as error:  # cel-python's own, while it puts an error into words
        return CELEvalError(str(error))


@functools.cache
def _program(expression: str) -> Any:
    environment = celpy.Environment()
    functions = {"split": _split, "replace": _replace, "substring": _substring, "dyn": lambda value: value}
    return environment.program(environment.compile(expression), functions=functions)


def _split(text: Any, separator: Any) -> Any:
    return celtypes.ListType([celtypes.StringType(part) for part in str(text).split(str(separator))])


def _replace(text: Any, old: Any, new: Any) -> Any:
    return celtypes.StringType(str(text).replace(str(old), str(new)))


def _substring(text: Any, start: Any) -> Any:
    if not 0 <= int(start) <= len(text):
        return CELEvalError("substring: index out of range")
    return celtypes.StringType(str(text)[int(start) :])
