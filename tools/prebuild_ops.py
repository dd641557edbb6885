"""Build DeepSpeed's CPU op for asynchronous I/O once, into the virtual environment, so that no rank waits for it.

It is for a teacher on NVMe, and needs libaio's headers. Its first use otherwise compiles it while the other ranks wait
on a file lock. Run by `make install`; does nothing where there is a GPU or the op is there already.
"""

import os
import sys
import time
from pathlib import Path

FOLDER = Path(sys.prefix) / "torch_extensions"


def main() -> int:
    """Build the op; a failure is told but is none of the installation."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        sys.stdout.write("a GPU is here: no CPU op to build\n")
        return 0
    os.environ |= {"TORCH_EXTENSIONS_DIR": str(FOLDER), "DS_ACCELERATOR": "cpu"}
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    from deepspeed.ops.op_builder.cpu.async_io import AsyncIOBuilder

    from minima.engine.ops import load_op

    builder, what = AsyncIOBuilder(), "the CPU op for asynchronous I/O"
    if not builder.is_compatible():
        sys.stdout.write(f"no teacher can lie on NVMe: {what} needs libaio-dev and a C compiler\n")
        return 0
    began = time.monotonic()
    try:
        load_op(builder)
    except Exception as error:  # whatever a compiler or a linker ends with
        sys.stdout.write(f"no teacher can lie on NVMe: {what} could not be built: {error}\n")
        return 0
    sys.stdout.write(f"{what} is in {FOLDER} ({time.monotonic() - began:.0f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
