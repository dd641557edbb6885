"""Runs one Python file that a model wrote: without network where the kernel allows it, and within limits.

    python -I run_untrusted.py PROGRAM < TOKEN

Says the token once the program has come to its end. This keeps accidents small and is no prison: whoever expects malice
runs the whole stage in a container.
"""

import ctypes
import os
import resource
import runpy
import sys

CPU_SECONDS = 4  # the field's own runner gives a program 3 seconds, and starting Python takes part of one
MEMORY_BYTES = 4 << 30
FILE_BYTES = 16 << 20
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET in linux/sched.h


def main() -> None:
    """Shut the doors, then run."""
    token = sys.stdin.buffer.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    say = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)  # refused inside some containers; the limits hold all the same
    runpy.run_path(sys.argv[1], run_name="__main__")
    os.write(say, token)
    os._exit(0)  # not the program's exit handlers


main()
