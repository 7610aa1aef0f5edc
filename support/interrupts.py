"""A process that ends before it has anything to save: by Ctrl-C, or because its launcher is gone.

Standard library only, because a script calls it before it imports the rest, which takes seconds.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

from support import processes


def end_at_once() -> None:
    """Ctrl-C ends the process where it is. A KeyboardInterrupt would be a traceback, or swallowed, or turned into
    another error, by the module in the middle of whose import it is raised.

    A process of several gets SIGTERM when its launcher ends, even by `kill -9`: none trains on alone, unseen."""
    signal.signal(signal.SIGINT, _end)
    if processes.count() > 1:
        processes.end_before_python_does()  # the first of all exit handlers, so that it comes last
        if sys.platform == "linux":
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def raise_again() -> None:
    """Ctrl-C is a KeyboardInterrupt, as without `end_at_once`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame) -> None:
    if processes.is_main():
        os.write(2, f"\n{Path(sys.argv[0]).name}: interrupted before anything was begun\n".encode())
    os._exit(128 + number)
