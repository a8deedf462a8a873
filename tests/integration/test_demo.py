"""`make demo`, as the README has it: the whole main job, with every check of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.demo.model import model_folder

ROOT = Path(__file__).parents[2]


def test_the_demo_ends_well() -> None:
    model_folder(ROOT / "build" / "model")  # a download has its own patience
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nearest to king: kings, queen, monarch") == 2
    for reason in ("TokenMissing (18)", "IdentityRefused (40)", "BootStateRefused (35)", "DecryptionRefused (45)"):
        assert reason in done.stdout
    assert "All of it was as it should be" in done.stdout
