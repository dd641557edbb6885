"""Memory of models that are gone, back to whoever wants it next."""

import ctypes
import gc

from deepspeed.accelerator import get_accelerator


def return_unused() -> None:
    """Give what the allocators keep of freed tensors back: to the device, and to the machine.

    The C library keeps blocks below 32 MB, so a process that has closed a model holds most of its memory on: other
    ranks, and files that are read again, would go without.
    """
    gc.collect()
    get_accelerator().empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
