"""Build DeepSpeed's CPU ops once, into the virtual environment, so that no rank waits for them.

The first process group on a CPU otherwise compiles it while the other ranks wait on a file lock, and a build that is
killed leaves that lock behind. Run by `make install`; does nothing where there is a GPU or the ops are there already.
The communication op is for every run; the one for asynchronous I/O for a teacher on NVMe, and needs libaio's headers.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(sys.prefix) / "torch_extensions"


def main() -> int:
    """Build the ops; a failure is told but is none of the installation: gloo then carries everything."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        sys.stdout.write("a GPU is here: no CPU op to build\n")
        return 0
    os.environ |= {"TORCH_EXTENSIONS_DIR": str(FOLDER), "DS_ACCELERATOR": "cpu"}
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    for lock in list(FOLDER.glob("**/lock")):
        shutil.rmtree(lock.parent, ignore_errors=True)  # a build that was killed: its folder cannot be trusted
    from deepspeed.ops.op_builder.cpu.async_io import AsyncIOBuilder
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    build("communication", ShareMemCommBuilder(), "gloo will be used alone")
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
    except (RuntimeError, OSError, ImportError) as error:
        sys.stdout.write(f"the CPU op for {name} could not be built, so {without}: {error}\n")
        return
    sys.stdout.write(f"the CPU op for {name} is in {FOLDER} ({time.monotonic() - began:.0f} s)\n")


if __name__ == "__main__":
    sys.exit(main())
