"""Makes the shells' completions of `sczctl`, which are click's own: `make man` → build/completions/*/*."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from click.shell_completion import get_completion_class

from oci_hook.cli import cli

FILES = {"bash": "bash/sczctl", "zsh": "zsh/_sczctl", "fish": "fish/sczctl.fish"}
"""Named as each shell looks for them."""
_ZSH_ENDING = re.compile(r"^if \[\[ \$zsh_eval_context.*?^fi\n+", re.MULTILINE | re.DOTALL)


def completions() -> dict[str, str]:
    """Each shell's file by its path."""
    made = {}
    for shell, path in FILES.items():
        kind = get_completion_class(shell)
        if kind is None:
            raise SystemExit(f"completions: click knows no {shell}")
        # Not BashComplete's own source(), which asks the bash of this machine for its version.
        made[path] = kind.source_template % kind(cli, {}, "sczctl", "_SCZCTL_COMPLETE").source_vars()
    # As click ends it, the file completes when zsh loads it and from the third time on: the second only registers it.
    made[FILES["zsh"]], changed = _ZSH_ENDING.subn('_sczctl_completion "$@"\n', made[FILES["zsh"]])
    if changed != 1:
        raise SystemExit("completions: click's file for zsh does not end as it did: does it still need this change?")
    return made


def main(arguments: list[str]) -> int:
    """Write every file below the folder that is given, which is emptied first."""
    (output,) = arguments
    shutil.rmtree(output, ignore_errors=True)
    for path, text in completions().items():
        file = Path(output) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
