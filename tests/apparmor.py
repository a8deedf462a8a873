"""What a program did, by strace, and what an AppArmor profile allows, by the parser's own flattened text.

Profiles are not enforced here (the kernel may have no AppArmor): each file that the program opened, and each program
that it started, is looked for among the profile's rules, whose globs are matched as apparmor.d(5) says.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_CALLS = "%file,socket,bind,connect,sendto,sendmsg,umount2,mount,open_tree,move_mount,fspick,setns,ptrace,kill"


@dataclass(frozen=True, order=True)
class Access:
    """One file and what was done with it (`r`, `w`, `x`); directories end in a slash."""

    path: str
    mode: str


def trace(words: Sequence[str], log: Path) -> str:
    """Run a program under strace; returns strace's lines."""
    command = ["/usr/bin/strace", "-f", "-y", "-qq", "-s", "4096", "-e", f"trace={_CALLS}", "-o", str(log), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    return log.read_text()


def accesses(lines: str) -> set[Access]:
    """The files of a trace; what failed is left out, and so are descriptors by path alone (O_PATH)."""
    found = set()
    for line in lines.splitlines():
        if match := re.search(r'sun_path="(/[^"]+)"', line):  # also one that nobody listens to
            found.add(Access(match[1], "w"))
        elif match := re.search(r"\bopen(?:at)?2?\(.*?((?:O_\w+\|?)+).* = \d+<(/[^>]*)>", line):
            flags, path = match[1].split("|"), match[2].removesuffix(" (deleted)")
            if "O_PATH" in flags:
                continue
            is_directory = "O_DIRECTORY" in flags or os.path.isdir(path)
            path += "/" if is_directory and path != "/" else ""
            modes = {"O_RDWR": "rw", "O_WRONLY": "w"}.get(flags[0], "r")
            found |= {Access(path, mode) for mode in modes + ("w" if "O_CREAT" in flags else "")}
        elif match := re.search(r"\bexecve\(\"([^\"]+)\".* = 0", line):
            found.add(Access(os.path.realpath(match[1]), "x"))
        elif match := re.search(
            r"\b(?:rename\w*|unlink\w*|rmdir|mkdir\w*|truncate|link\w*|symlink\w*)\((.*)\) += 0", line
        ):
            directory = re.match(r"(?:\d+|AT_FDCWD)<([^>]*)>, ", match[1])
            names = re.findall(r'"([^"]*)"', match[1])
            folder = directory[1] if directory else "/"
            end = "/" if re.search(r"\b(mkdir|rmdir)", line) or "AT_REMOVEDIR" in line else ""
            found |= {Access(os.path.join(folder, name) + end, "w") for name in names}
    return found


def moved(found: Iterable[Access], places: Mapping[str, str]) -> set[Access]:
    """The accesses as they are in a packaged installation.

    Args:
        found: As traced.
        places: Directories here, and there; the longest that fits counts.
    """
    result = set()
    for access in found:
        here = [place for place in places if access.path.startswith(f"{place}/") or access.path == place]
        place = max(here, key=len, default="")
        result.add(Access((places[place] if place else "") + access.path[len(place) :], access.mode))
    return result


# --- profiles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One rule for files."""

    pattern: re.Pattern[str]
    modes: str


class Profile:
    """One profile of a file, as `apparmor_parser --preprocess` shows it: abstractions and all."""

    def __init__(self, file: Path, name: str, *, include: Path | None = None) -> None:
        search = ["-I", str(include)] if include is not None else []
        shown = subprocess.run(
            ["/usr/sbin/apparmor_parser", *search, "--preprocess", str(file)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        self._variables: dict[str, list[str]] = {}
        for variable, plus, values in re.findall(r"^\s*(@\{\w+\})\s*(\+?)=\s*(.*)$", shown, re.MULTILINE):
            words = [word.strip('"') for word in values.split()]
            self._variables[variable] = [*(self._variables.get(variable, []) if plus else []), *words]
        body = re.search(rf"^profile {name}\b[^{{]*\{{\n(.*?)^\}}", shown, re.MULTILINE | re.DOTALL)
        assert body is not None, f"no profile {name} in {file}"
        lines = [line.strip() for line in body[1].splitlines()]
        self.lines = [line for line in lines if line and not line.startswith("#")]
        plain = [line.removeprefix("audit ") for line in self.lines]
        self._allowing = self._rules(line for line in plain if not line.startswith("deny "))
        self._denying = self._rules(line.removeprefix("deny ") for line in plain if line.startswith("deny "))
        assert self._allowing

    def _rules(self, lines: Iterable[str]) -> list[Rule]:
        return [rule for line in lines if (rule := self._rule(line)) is not None]

    def _rule(self, line: str) -> Rule | None:
        match = re.fullmatch(r'(?:owner\s+)?"?([/@]\S*?)"?\s+([a-zA-Z]+)(?:\s*->.*)?,.*', line)
        if match is None:
            return None
        return Rule(re.compile("|".join(_as_regex(path) for path in self._expanded(match[1]))), match[2])

    def _expanded(self, text: str) -> list[str]:
        match = re.search(r"@\{\w+\}", text)
        if match is None:
            return [text]
        values = self._variables.get(match[0], [])
        whole = [text[: match.start()] + value + text[match.end() :] for value in values]
        return [each for one in whole for each in self._expanded(re.sub(r"(?<=.)//+", "/", one))]

    def allows(self, access: Access) -> bool:
        """Whether a rule lets it happen."""
        return self._has(self._allowing, access) and not self._has(self._denying, access)

    @staticmethod
    def _has(rules: list[Rule], access: Access) -> bool:
        return any(access.mode in rule.modes and rule.pattern.fullmatch(access.path) for rule in rules)

    def denied(self, found: Iterable[Access]) -> list[str]:
        """What would be refused."""
        return sorted(f"{access.path} {access.mode}" for access in found if not self.allows(access))


def _as_regex(glob: str) -> str:
    """apparmor.d(5), "Globbing": `*` and `?` stay in a directory, `**` does not, braces are alternatives."""
    out, position, depth = "", 0, 0
    while position < len(glob):
        char = glob[position]
        if glob.startswith("**", position):
            out, position = out + ("[^/].*" if out.endswith("/") else ".*"), position + 1
        elif char == "*":
            out += "[^/]+" if out.endswith("/") and glob[position + 1 :][:1] in ("", "/") else "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "{":
            out, depth = out + "(?:", depth + 1
        elif char == "}":
            out, depth = out + ")", depth - 1
        elif char == "," and depth:
            out += "|"
        elif char == "[":
            end = glob.index("]", position)
            out, position = out + glob[position : end + 1], end
        elif char == "\\":
            out, position = out + re.escape(glob[position + 1]), position + 1
        else:
            out += re.escape(char)
        position += 1
    return out
