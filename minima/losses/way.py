"""How a distillation loss is computed, not what: the chunk size, and plain torch or Triton."""

from typing import Literal, NamedTuple, get_args

import torch

from minima.errors import MinimaError
from minima.losses.checks import check_chunk
from minima.triton_driver import triton_trouble

Kernel = Literal["auto", "eager", "triton"]
_DO = "leave kernel at 'auto', or give 'eager'"


class Way(NamedTuple):
    """How a loss is computed; changes its value by rounding only.

    Attributes:
        chunk_tokens: number of tokens whose logits exist at one time.
        kernel: see `linear_distillation_loss`.
    """

    chunk_tokens: int
    kernel: Kernel

    def check(self, device: torch.device, truncated: bool = False) -> None:
        """Refuse settings that cannot work.

        Args:
            device: where the tensors are.
            truncated: whether the teacher is truncated to its top tokens.

        Raises:
            MinimaError: the chunk size is invalid, or the kernel is unknown or cannot run.
        """
        check_chunk(self.chunk_tokens)
        if self.kernel not in get_args(Kernel):
            raise MinimaError(
                f"kernel {self.kernel!r}", "there is no such kernel", f"give one of {', '.join(get_args(Kernel))}"
            )
        if self.kernel != "triton":
            return
        if truncated:
            raise MinimaError(
                "kernel 'triton' with top_k or top_p", "the Triton kernel does not support a truncated teacher", _DO
            )
        if (trouble := _no_kernel(device)) is not None:
            raise MinimaError(f"kernel 'triton', but {trouble}", "it needs a GPU that Triton can use", _DO)

    def is_fused(self, device: torch.device, truncated: bool) -> bool:
        """Whether Triton computes everything between the logits and their gradient."""
        if self.kernel == "auto":
            return device.type == "cuda" and not truncated and triton_trouble() is None
        return self.kernel == "triton"


def _no_kernel(device: torch.device) -> str | None:
    """Why no Triton kernel can run on this device; None if it can."""
    try:
        from minima.losses.triton_kernels import interpreted
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if interpreted():
        return None
    return triton_trouble() if device.type == "cuda" else f"the tensors are on the {device.type}"
