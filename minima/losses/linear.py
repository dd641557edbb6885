"""Matrix products between hidden states and an output head, with sums and results in float32.

Shapes: C tokens of one chunk, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from minima.errors import MinimaError

F = TypeVar("F", bound=Callable[..., Any])

# Elements of one block of rows in the element-wise part of a loss: on a CPU a block and its temporaries stay in the
# cache (2^17 float32 numbers are 0.5 MB); a GPU wants few, large kernels.
_BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**25}
_NARROW = (torch.bfloat16, torch.float16)  # what a GPU multiplies into float32
_NARROWED_ELEMENTS = 2**24  # 32 MB of bfloat16 beside the sum


def without_autocast(step: F) -> F:
    """A step of an autograd function that chooses its dtypes itself, whatever the caller's `torch.autocast` says.

    There a float32 product would be rounded to bfloat16, and with it the loss.
    """

    @functools.wraps(step)
    def inner(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return step(ctx, first, *others)

    return inner  # type: ignore[return-value]


def first_order(backward: F) -> F:
    """A backward pass without a derivative of its own, which refuses to be asked for one.

    torch's `once_differentiable` gives a gradient without a graph where the incoming gradient has none: a second
    derivative of the loss would silently be zero.
    """

    @functools.wraps(backward)
    def inner(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise MinimaError(
                "a gradient of this loss with `create_graph=True`",
                "its gradient is computed in chunks that no graph remembers, so every second derivative would be zero",
                "leave create_graph away, or take second derivatives of a loss over dense logits",
            )
        return backward(ctx, *gradients)

    return inner  # type: ignore[return-value]


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now was told to keep its graph (`retain_graph`), for another pass through it.

    What torch's own compiler asks before it reuses saved tensors. A torch that does not say counts as yes.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return torch.compiler.is_compiling() or ask is None or ask()


class ChunkBuffers:
    """Matrices of the size of one chunk's logits, taken once and used for every chunk.

    A block of memory as large as that goes back to the system as soon as it is free, so that a CPU would be given new
    pages, and clear them, for every chunk.

    Args:
        vocabulary: columns.
        device: where they lie.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str, num_tokens: int, most_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first rows of the matrix called `name`, which has `most_tokens`; in them is what was left there."""
        if name not in self._kept:
            self._kept[name] = torch.empty(most_tokens, self._vocabulary, dtype=dtype, device=self._device)
        return self._kept[name][:num_tokens]


def logits_head(head_VD: Tensor, hidden_dtype: torch.dtype) -> Tensor:
    """The head as `float_logits` wants it for all chunks of hidden states of this dtype."""
    if hidden_dtype in _NARROW and head_VD.is_cuda:
        return head_VD.to(hidden_dtype)
    return head_VD.float()  # no CPU kernel multiplies bfloat16 into float32, and no kernel float64


def float_logits(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor | None = None) -> Tensor:
    """Float32 logits [C, V]. Rounding them to bfloat16 would cost 18 % of the gradient at a KL of 0.01 nats.

    Args:
        hidden_CD: of one chunk.
        head_VD: the output head, from `logits_head` where there are many chunks.
        out_CV: is overwritten and returned, where given.
    """
    head_VD = logits_head(head_VD, hidden_CD.dtype)
    if head_VD.dtype == torch.float32:
        return torch.mm(hidden_CD.float(), head_VD.t(), out=out_CV)
    if out_CV is None:
        return torch.mm(hidden_CD, head_VD.t(), out_dtype=torch.float32)
    return torch.mm(hidden_CD, head_VD.t(), out_dtype=torch.float32, out=out_CV)


def add_outer(sum_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum_VD += gradient_CV^T hidden_CD, with the sum in float32."""
    if gradient_CV.dtype == torch.float32:
        sum_VD.addmm_(gradient_CV.t(), hidden_CD)
    elif gradient_CV.is_cuda and gradient_CV.dtype in _NARROW:
        try:  # one pass over the sum, and no second matrix of its size
            torch.addmm(sum_VD, gradient_CV.t(), hidden_CD, out_dtype=torch.float32, out=sum_VD)
        except RuntimeError:  # an older torch wants a sum in the factors' dtype
            sum_VD.add_(torch.mm(gradient_CV.t(), hidden_CD, out_dtype=torch.float32))
    else:
        sum_VD.add_(torch.mm(gradient_CV.t(), hidden_CD))


def narrowed(sum_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """A finished float32 sum in `dtype`. The sum is lost: its own memory takes the result, for there is no second."""
    if torch.empty(0, dtype=dtype).element_size() >= sum_VD.element_size():
        return sum_VD.to(dtype)
    wide = sum_VD.view(-1)
    narrow = wide.view(dtype)[: wide.numel()]
    for start in range(0, wide.numel(), _NARROWED_ELEMENTS):  # what is written lies before what is still to be read
        block = slice(start, start + _NARROWED_ELEMENTS)
        narrow[block] = wide[block].to(dtype)
    return narrow.view(sum_VD.shape)


def row_blocks(logits_CV: Tensor, bytes_an_element: int = 16) -> list[slice]:
    """The rows of a chunk's logits in blocks of a size that suits element-wise work on their device.

    Args:
        logits_CV: of the chunk.
        bytes_an_element: of what the work holds beside the logits; blocks on a GPU are smaller where it is more.
    """
    num_tokens, vocabulary = logits_CV.shape
    elements = _BLOCK_ELEMENTS[logits_CV.device.type]
    if logits_CV.device.type == "cuda":
        elements = elements * 16 // max(16, bytes_an_element)
    rows = max(1, elements // vocabulary)
    return [slice(start, start + rows) for start in range(0, num_tokens, rows)]


def add_gradients(
    gradient_CV: Tensor,
    hidden_CD: Tensor,
    keep_C: Tensor,
    head_VD: Tensor,
    grad_hidden_CD: Tensor | None,
    grad_head_VD: Tensor | None,
) -> None:
    """What the gradient of a chunk's logits is for the hidden states and for the head, where each is wanted.

    Args:
        gradient_CV: in the hidden states' dtype.
        hidden_CD: of the chunk.
        keep_C: bool; whether a token counts. The gradient of one that does not is zero, and its hidden state, which
            may be anything, has no say in the head's.
        head_VD: the output head.
        grad_hidden_CD: is overwritten.
        grad_head_VD: float32; is added to.
    """
    if grad_hidden_CD is not None:
        torch.mm(gradient_CV, head_VD.to(hidden_CD.dtype), out=grad_hidden_CD)
    if grad_head_VD is not None:
        add_outer(grad_head_VD, gradient_CV, hidden_CD.masked_fill(~keep_C.unsqueeze(1), 0.0))
