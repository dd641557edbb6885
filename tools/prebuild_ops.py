"""Build DeepSpeed's CPU communication op once, into the virtual environment, so that no rank waits for it.

The first process group on a CPU otherwise compiles it while the other ranks wait on a file lock, and a build that is
killed leaves that lock behind. Run by `make install`; does nothing where there is a GPU or the op is there already.
"""

import os
import shutil
import sys
import time
from pathlib import Path

FOLDER = Path(sys.prefix) / "torch_extensions"
OP = "deepspeed_shm_comm"


def main() -> int:
    """Build the op; a failure is told but is none of the installation: gloo then carries everything."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        sys.stdout.write("a GPU is here: no CPU op to build\n")
        return 0
    os.environ |= {"TORCH_EXTENSIONS_DIR": str(FOLDER), "DS_ACCELERATOR": "cpu"}
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    for lock in FOLDER.glob("**/lock"):
        shutil.rmtree(lock.parent, ignore_errors=True)  # a build that was killed: its folder cannot be trusted
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    began = time.monotonic()
    try:
        ShareMemCommBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        sys.stdout.write(f"the CPU op {OP} could not be built, so gloo will be used alone: {error}\n")
        return 0
    sys.stdout.write(f"the CPU op {OP} is in {FOLDER} ({time.monotonic() - began:.0f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
