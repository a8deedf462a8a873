"""For every part: an interrupt ends what tests start, also where they run below a shell's background job."""

from __future__ import annotations

import signal

# Such a job ignores it, and whoever inherits that does not end by it; a handler of ours is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
