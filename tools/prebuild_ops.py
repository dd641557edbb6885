"""Build DeepSpeed's CPU op for asynchronous I/O once, into the virtual environment, so that no rank has to wait for it.

The op is needed for a teacher on NVMe, and building it needs libaio's headers. Otherwise it is compiled at first use,
while the other ranks wait on a file lock. Run by `make install`; does nothing if there is a GPU or the op exists.
"""

import os
import sys
import time
from pathlib import Path

FOLDER = Path(sys.prefix) / "torch_extensions"


def main() -> int:
    """Build the op; a failure is reported but does not fail the installation."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        sys.stdout.write("this machine has a GPU: no CPU op to build\n")
        return 0
    os.environ |= {"TORCH_EXTENSIONS_DIR": str(FOLDER), "DS_ACCELERATOR": "cpu"}
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    from deepspeed.ops.op_builder.cpu.async_io import AsyncIOBuilder

    from minima.engine.ops import load_op

    builder, what = AsyncIOBuilder(), "the CPU op for asynchronous I/O"
    if not builder.is_compatible():
        sys.stdout.write(f"no teacher can be placed on NVMe: {what} needs libaio-dev and a C compiler\n")
        return 0
    began = time.monotonic()
    try:
        load_op(builder)
    except Exception as error:  # a compiler or linker may fail in any way
        sys.stdout.write(f"no teacher can be placed on NVMe: {what} could not be built: {error}\n")
        return 0
    sys.stdout.write(f"{what} is in {FOLDER} ({time.monotonic() - began:.0f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
