"""Build DeepSpeed's CPU op for asynchronous I/O once, into the virtual environment, so that no rank waits for it.

It is for a teacher on NVMe, and needs libaio's headers. Its first use otherwise compiles it while the other ranks wait
on a file lock. Run by `make install`; does nothing where there is a GPU or the op is there already.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(sys.prefix) / "torch_extensions"


def main() -> int:
    """Build the op; a failure is told but is none of the installation."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        sys.stdout.write("a GPU is here: no CPU op to build\n")
        return 0
    os.environ |= {"TORCH_EXTENSIONS_DIR": str(FOLDER), "DS_ACCELERATOR": "cpu"}
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    for lock in list(FOLDER.glob("**/lock")):
        shutil.rmtree(lock.parent, ignore_errors=True)  # a build that was killed: its folder cannot be trusted
    from deepspeed.ops.op_builder.cpu.async_io import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible():
        build("asynchronous I/O", AsyncIOBuilder(), "no teacher can lie on NVMe")
    else:
        sys.stdout.write("no CPU op for asynchronous I/O: it needs libaio-dev, and is for teachers on NVMe alone\n")
    return 0


def build(name: str, builder: Any, without: str) -> None:
    """Build one op, and say what became of it."""
    began = time.monotonic()
    from minima.engine.ops import load_op

    try:
        load_op(builder)
    except Exception as error:  # whatever a compiler or a linker ends with
        sys.stdout.write(f"the CPU op for {name} could not be built, so {without}: {error}\n")
        return
    sys.stdout.write(f"the CPU op for {name} is in {FOLDER} ({time.monotonic() - began:.0f} s)\n")


if __name__ == "__main__":
    sys.exit(main())
