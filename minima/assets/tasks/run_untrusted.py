"""Runs one Python file that a model wrote, within resource limits and, if the kernel allows it, without network.

    python -I run_untrusted.py PROGRAM < TOKEN

Prints the token once the program has run to its end. This limits accidents but is not a sandbox: against malicious
code, run the whole stage in a container.
"""

import ctypes
import os
import resource
import runpy
import sys

CPU_SECONDS = 4  # HumanEval's own runner allows 3 seconds, and starting Python takes part of a second
MEMORY_BYTES = 4 << 30
FILE_BYTES = 16 << 20
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET in linux/sched.h


def main() -> None:
    """Set the limits, then run the program."""
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
    ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)  # refused in some containers; the limits still apply
    runpy.run_path(sys.argv[1], run_name="__main__")
    os.write(say, token)
    os._exit(0)  # skips the program's exit handlers


main()
