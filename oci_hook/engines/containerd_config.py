"""containerd's configuration as containerd puts it together from its main file and what that imports.

Up to 1.7 a plugin's section in an imported file replaces the whole section that came before; from 2.0 on tables are
merged, provided that the files are of one version. Seen with 1.6.20, 1.7.24 and 2.1.9 (`containerd config dump`) and
in its source (`LoadConfig`, `mergeConfig`). Nothing is written here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from oci_hook.engines.plan import HostFiles, strings, table
from oci_hook.errors import ConfigInvalid

SECTIONS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
"""The plugin whose `containerd.runtimes` are the handlers, by the version of the configuration."""
DROP_INS = "/etc/containerd/conf.d/*.toml"
"""What containerd 2.2 imports if it has no configuration (`DefaultConfigIncludePattern`)."""
_MAX_FILES = 100


@dataclass(frozen=True, slots=True)
class Configuration:
    """The files in the order in which containerd reads them: the main one, then its imports, then theirs.

    Attributes:
        main: Path of the main file, which may be absent: then nothing was read.
        patterns: What is imported, absolute.
    """

    main: str
    documents: tuple[tuple[str, dict[str, Any]], ...]
    patterns: tuple[str, ...]

    @property
    def version(self) -> int:
        """Of the main file; 0 if it names none, or is absent."""
        found = self.documents[0][1].get("version") if self.documents else 0
        return found if isinstance(found, int) else 0

    def imports(self, path: str) -> bool:
        """Whether that file is read, or will be once it is there."""
        return any(_matches(pattern, path) for pattern in self.patterns)

    def names(self, path: str) -> bool:
        """Whether that file is named outright: then containerd does not start without it."""
        return path in self.patterns

    def sections(self, *, without: str = "") -> list[tuple[str, dict[str, Any]]]:
        """Each file that has the handlers' plugin, with that section."""
        return [
            (path, table(document, "plugins", name))
            for path, document in self.documents
            for name in SECTIONS.values()
            if path != without and name in table(document, "plugins")
        ]

    def handlers(self, *, merges: bool, without: str = "") -> dict[str, dict[str, Any]]:
        """The configured handlers that are in force, by name."""
        found: dict[str, dict[str, Any]] = {}
        for _, section in self.sections(without=without):
            named = table(section, "containerd", "runtimes")
            found = {**found, **named} if merges else dict(named)
        return {name: value for name, value in found.items() if isinstance(value, dict)}

    def disables_pods(self) -> bool:
        """Whether the CRI plugin is switched off, as in the file that Docker's own packages bring."""
        off = {name for _, document in self.documents for name in strings(document.get("disabled_plugins"))}
        return bool({"cri", "io.containerd.grpc.v1.cri"} & off)


def load_configuration(main: str, files: HostFiles) -> Configuration:
    """Read the main file and all that it imports.

    Raises:
        ConfigInvalid: One is not TOML, or there are more than a hundred.
        FileUnreadable: One cannot be read.
    """
    documents: list[tuple[str, dict[str, Any]]] = []
    patterns: list[str] = []
    pending, seen = [main], set()
    while pending:
        path = pending.pop(0)
        if path in seen:
            continue
        seen.add(path)
        if len(seen) > _MAX_FILES:
            raise ConfigInvalid(f"{main} imports more than {_MAX_FILES} files", remedy=f"correct {main}")
        document = files.read_toml(path)
        if document is None:
            continue
        documents.append((path, document))
        for item in strings(document.get("imports")):
            pattern = os.path.normpath(os.path.join(os.path.dirname(path), item))
            patterns.append(pattern)
            pending += _expand(pattern, files)
    return Configuration(main, tuple(documents), tuple(patterns))


def _expand(pattern: str, files: HostFiles) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    folder = os.path.dirname(pattern)  # a star in a folder's name: Go's Glob allows it, nobody does it
    return [path for path in files.below(folder) if _matches(pattern, path)]


def _matches(pattern: str, path: str) -> bool:
    """As Go's filepath.Match: a star does not cross a slash."""
    wanted, given = pattern.split("/"), path.split("/")
    return len(wanted) == len(given) and all(map(fnmatchcase, given, wanted))
