"""Hand back the memory of closed models."""

import ctypes
import gc

from deepspeed.accelerator import get_accelerator


def return_unused() -> None:
    """Return the memory that allocators keep of freed tensors to the device and to the operating system.

    The C library keeps freed blocks below 32 MB, so a process that has closed a model would hold on to most of its
    memory, which other ranks and the page cache could use.
    """
    gc.collect()
    get_accelerator().empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
