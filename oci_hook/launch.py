"""How an engine starts the hook: `python3 -I -S …/oci_hook/launch.py [--config FILE] STAGE`.

Isolated (-I) and without site (-S), so that neither the environment nor a user's folder chooses what root runs and
nothing is imported that a container without our annotations does not need. Our packages lie beside this one.
While the package is being installed or upgraded, or after that was cut off, modules of two versions may lie there: then
the mark of its preinst lies there too, and nothing of them is used. Whatever else keeps them from being imported is
said in the same way: one line, and the exit code that `sczctl why` knows (`errors.InstallationIncomplete`).
This file is compiled at each start, so there is little of it.
"""

import posix
import sys

_PLACE = __file__.rpartition("/oci_hook/")[0]  # a script's is absolute

sys.dont_write_bytecode = True  # the package's scripts compile; a hook writes nothing where root's programs lie

try:
    if posix.access(_PLACE + "/.incomplete", posix.F_OK):
        raise ImportError("an installation or upgrade of the package is under way, or was cut off")
    path, sys.path = sys.path, [_PLACE]  # else the interpreter's own folders are listed first, which takes longer
    from oci_hook.fast_path import first_look

    sys.path = [*path, _PLACE]
    nothing, state = first_look(sys.argv[1:])
    if nothing:
        posix._exit(0)  # there is nothing to tidy up
    import gc

    gc.disable()  # a twentieth of the start, for a process that ends soon
    from oci_hook.hook import main

    code = main(sys.argv[1:], state)
except Exception as error:
    remedy = "`dpkg --configure -a`, `apt install --reinstall scz-smm`; with rpm: `rpm -U --replacepkgs FILE`"
    problem = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"scz-hook: InstallationIncomplete (72): {_PLACE}: {problem}; remedy: {remedy}", file=sys.stderr)
    code = 72
sys.exit(code)
