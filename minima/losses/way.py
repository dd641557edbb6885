"""How a distillation loss is computed: tokens of a chunk, and plain torch or Triton. No part of what is computed."""

from typing import Literal, NamedTuple, get_args

import torch

from minima.errors import MinimaError
from minima.losses.checks import check_chunk
from minima.triton_driver import triton_trouble

Kernel = Literal["auto", "eager", "triton"]
_DO = "leave kernel at 'auto', or give 'eager'"


class Way(NamedTuple):
    """How a loss is computed; nothing here changes it beyond rounding.

    Attributes:
        chunk_tokens: tokens whose logits exist at one time.
        kernel: see `linear_distillation_loss`.
    """

    chunk_tokens: int
    kernel: Kernel

    def check(self, device: torch.device, truncated: bool = False) -> None:
        """Refuse what cannot be done.

        Args:
            device: where the tensors are.
            truncated: whether the teacher is cut.

        Raises:
            MinimaError: the chunk is of no tokens, or the kernel is unknown, or cannot run.
        """
        check_chunk(self.chunk_tokens)
        if self.kernel not in get_args(Kernel):
            raise MinimaError(
                f"kernel {self.kernel!r}", "no such kernel is there", f"give one of {', '.join(get_args(Kernel))}"
            )
        if self.kernel != "triton":
            return
        if truncated:
            raise MinimaError(
                "kernel 'triton' with top_k or top_p", "there is no Triton kernel for a teacher that is cut", _DO
            )
        if (trouble := _no_kernel(device)) is not None:
            raise MinimaError(f"kernel 'triton', and {trouble}", "it runs on a GPU that Triton can reach", _DO)

    def is_fused(self, device: torch.device, truncated: bool) -> bool:
        """Whether Triton does what lies between the logits and their gradient."""
        if self.kernel == "auto":
            return device.type == "cuda" and not truncated and triton_trouble() is None
        return self.kernel == "triton"


def _no_kernel(device: torch.device) -> str | None:
    """Why no Triton kernel runs on tensors there; None where one does."""
    try:
        from minima.losses.triton_kernels import interpreted
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if interpreted():
        return None
    return triton_trouble() if device.type == "cuda" else f"the tensors are on the {device.type}"
