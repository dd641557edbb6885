"""Import this in a process that runs Triton's interpreter, before the first kernel."""

from typing import Any

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_and_index(tensor: Any, *scope: Any) -> None:
    """Up to Triton 3.6 a kernel's `range` makes numbers of arrays by a way that NumPy refuses from 2.4 on."""
    _patch(tensor, *scope)
    put = scope[0].set_attr if scope else setattr  # which Triton undoes after the kernel
    put(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_and_index
