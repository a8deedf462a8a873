"""The hook as if the kernel were older than 6.4: a launcher for one test, never part of the project's own code."""

import sys
from pathlib import Path

# The installed package, as `launch.py` would find it: beside this interpreter's own test environment.
sys.path.append(next(str(p) for p in Path(__file__).parents[2].glob(".venv/lib/python3*/site-packages")))

from oci_hook.hook import main
from oci_hook.linux import mounts

mounts.probe_memory_filesystem = lambda: mounts.MemoryFilesystem.RAMFS

sys.exit(main(sys.argv[1:]))
