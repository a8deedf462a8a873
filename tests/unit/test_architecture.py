"""The house rules of the package, read from its syntax trees: floors, foreign libraries, sizes, what is never written.

A module imports from its own room and from lower floors; modules at the top of the package are a room for each floor.
A new module gets a floor here, on purpose. Source: docs of the project's design (the house) and its style.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "oci_hook"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

FLOORS = {
    1: {
        "errors",
        "key_errors",
        "documents",
        "trusted_file",
        "locks",
        "jws",
        "config",
        "https_client",
        "https_request",
        "audit",
        "audit_chain",
        "audit_files",
        "journal",
        "invocation",
        "disk_space",
    },
    2: {"access_policy", "lease", "tee_policy", "trust", "oci/", "linux/", "openbao"},
    3: {"held", "evidence_files", "records", "report", "metrics", "bundle/", "attestation/", "identity/"},
    4: {
        "boot_signatures",
        "enrolled",
        "provenance",
        "standby",
        "store",
        "trust_folder",
        "placement",
        "precedence",
        "revoked",
        "incoming",
        "intake",
        "release",
        "signing_key",
        "remote_appraisal",
        "delivery/",
        "owner/",
    }
    | {"broker", "copying", "granted"},
    5: {"admission"},
    6: {
        "adoption",
        "before_create",
        "bound_checks",
        "fast_path",
        "guest",
        "host",
        "hook",
        "keeping",
        "launch",
        "precreate",
        "prepare",
        "shim",
        "shim_binds",
        "start",
    },
    7: {"engines/", "nri/"},
    8: {"cli/"},
}

# Each of these is imported here alone, so that what it can do wrong is dealt with once.
ONLY_IN = {
    "ctypes": {"oci_hook.linux.syscalls"},
    "tpm2_pytss": {f"oci_hook.attestation.{name}" for name in ("esapi", "tpm", "tpm_enrolment")},
    "jose": {"oci_hook.jws"},
    "google": {"oci_hook.nri.schema"},
}
BROAD_EXCEPTS = {"oci_hook.hook", "oci_hook.launch", "oci_hook.shim", "oci_hook.cli"} | {
    "oci_hook.nri.connection"
}  # one each, at the top of a program or of a thread
MODULE_LINES, FUNCTION_LINES = 350, 60


def room(module: str) -> str:
    """`bundle/` for oci_hook.bundle.grant and oci_hook.bundle; `jws` for oci_hook.jws; empty for oci_hook."""
    parts = module.split(".")[1:]
    is_folder = len(parts) > 1 or (parts and MODULES.get(module, Path()).name == "__init__.py")
    return f"{parts[0]}/" if is_folder else ".".join(parts)


def floor(module: str) -> int:
    """The floor of a module; 0 for the package itself, which everybody may import."""
    if module == "oci_hook":
        return 0
    floors = [number for number, rooms in FLOORS.items() if room(module) in rooms]
    assert len(floors) == 1, f"{module} needs one floor in FLOORS"
    return floors[0]


def may_import(importer: str, imported: str) -> bool:
    """Own room, or a lower floor; modules at the top of the package also use those of their floor."""
    if room(importer) == room(imported) or floor(imported) < floor(importer):
        return True
    at_the_top = not (room(importer) + room(imported)).count("/")
    return at_the_top and floor(importer) == floor(imported)


def tree(module: str) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Dotted names of all that a module imports anywhere, also for types or in functions."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import in line {node.lineno}"
            name = node.module or ""
            # `from oci_hook.linux import syscalls` imports a module, `from oci_hook.jws import sign_token` a name
            yield from (f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name for alias in node.names)


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches everything and does not raise it again as its last act."""
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {""}
    last = handler.body[-1]
    return bool(names & {"", "Exception", "BaseException"}) and not (isinstance(last, ast.Raise) and last.exc is None)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_room_and_from_lower_floors(module: str) -> None:
    ours = [name for name in imports(module) if name.split(".")[0] == "oci_hook"]
    assert floor(module) >= 0
    assert [name for name in ours if name not in MODULES] == []
    assert [name for name in ours if not may_import(module, name)] == []


def test_the_rule_of_the_floors_refuses_what_it_should() -> None:
    assert may_import("oci_hook.jws", "oci_hook.documents")
    assert may_import("oci_hook.bundle.grant", "oci_hook.bundle.manifest")
    assert may_import("oci_hook.hook", "oci_hook.admission")
    assert not may_import("oci_hook.errors", "oci_hook.admission")
    assert not may_import("oci_hook.bundle.grant", "oci_hook.attestation.policy")
    assert not may_import("oci_hook.trust", "oci_hook.oci.state")


def test_modules_at_the_top_of_the_package_do_not_import_in_a_circle() -> None:
    left = {
        name: {other for other in imports(name) if other in MODULES and other.count(".") == 1} - {name, "oci_hook"}
        for name in MODULES
        if name.count(".") == 1 and MODULES[name].name != "__init__.py"
    }
    left = {name: others & left.keys() for name, others in left.items()}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_foreign_library_is_imported_in_one_place(library: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == library for name in imports(module))}
    assert users == ONLY_IN[library]


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_stay_readable(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MODULE_LINES
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno is not None}
    assert {name: lines for name, lines in long.items() if lines > FUNCTION_LINES} == {}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_rests_on_assert_or_on_a_shell(module: str) -> None:
    nodes = list(ast.walk(tree(module)))
    assert [node.lineno for node in nodes if isinstance(node, ast.Assert)] == []
    assert [node.value.lineno for node in nodes if isinstance(node, ast.keyword) and node.arg == "shell"] == []
    shells = {"system", "popen", "getoutput", "getstatusoutput"}
    assert [node.lineno for node in nodes if isinstance(node, ast.Attribute) and node.attr in shells] == []


@pytest.mark.parametrize("module", MODULES)
def test_only_the_entry_points_catch_everything(module: str) -> None:
    handlers = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ExceptHandler)]
    assert len([handler for handler in handlers if swallows(handler)]) <= (1 if module in BROAD_EXCEPTS else 0)


def test_the_hook_starts_with_the_standard_library_alone() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import oci_hook.hook; "
        "print(*sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names) - {'__main__'}))"
    )
    started = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], env={}, capture_output=True, text=True, check=False, timeout=30
    )
    assert (started.stdout.split(), started.stderr) == (["oci_hook"], "")
