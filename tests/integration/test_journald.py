"""Entries as the real systemd-journald takes them, and as journalctl finds them by our fields.

journald is started by hand in a mount namespace with a /run of its own; nothing of the machine's journal is touched.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from oci_hook.journal import MESSAGE_IDS

ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = """
set -e
mount -t tmpfs none /run
mkdir -p /run/systemd/journal /run/log/journal
/lib/systemd/systemd-journald >/dev/null 2>&1 &
journald=$!
trap 'kill $journald; wait $journald || true' EXIT
for _ in $(seq 100); do [ -S /run/systemd/journal/socket ] && break; sleep 0.1; done
cd "$1"
"$2" -c '
from oci_hook.journal import tell
tell("grant", "granted", container="c1", model="small:1")
tell("refused", "no", priority=3, container="c2", code=35, reason="BootStateRefused", subject="a\\nSCZ_CODE=1\\nb")
'
for _ in $(seq 100); do
    found=$(journalctl --directory=/run/log/journal --quiet --output=json SCZ_CODE=35)
    [ -z "$found" ] || break
    sleep 0.1
done
printf '%s\\n' "$found"
journalctl --directory=/run/log/journal --quiet --output=json SCZ_EVENT=grant
journalctl --directory=/run/log/journal --quiet --output=json SCZ_CODE=1
"""


def test_journald_takes_every_field() -> None:
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SCRIPT, "sh", str(ROOT), sys.executable]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran
    refused, grant = (json.loads(line) for line in ran.stdout.splitlines())
    assert refused["MESSAGE_ID"] == MESSAGE_IDS["refused"]
    assert (refused["SCZ_CONTAINER"], refused["SCZ_REASON"], refused["PRIORITY"]) == ("c2", "BootStateRefused", "3")
    assert refused["SCZ_SUBJECT"] == "a\nSCZ_CODE=1\nb"
    assert (grant["SCZ_MODEL"], grant["MESSAGE"]) == ("small:1", "granted")
