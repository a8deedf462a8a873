"""How an engine starts the hook: `python3 -I -S …/oci_hook/launch.py [--config FILE] STAGE`.

Isolated (-I) and without site (-S), so that neither the environment nor a user's folder chooses what root runs and
nothing is imported that a container without our annotations does not need. Our packages lie beside this one.
"""

import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from oci_hook.hook import main

sys.exit(main(sys.argv[1:]))
