"""Matrix products of hidden states and an output head, with accumulation and results in float32.

Shapes: C tokens of one chunk, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from minima import cpu_products
from minima.errors import MinimaError

F = TypeVar("F", bound=Callable[..., Any])

# Elements of one block of rows in the element-wise part of a loss: on a CPU a block and its temporaries should fit the
# cache (2^17 float32 numbers are 0.5 MB); a GPU runs best with few, large kernels.
_BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**25}
_NARROW = (torch.bfloat16, torch.float16)  # dtypes that a GPU can multiply with a float32 result
_NARROWED_ELEMENTS = 2**24  # a temporary of 32 MB in bfloat16 beside the sum


def without_autocast(step: F) -> F:
    """Make a step of an autograd function ignore the caller's `torch.autocast`: it chooses its dtypes itself.

    Under autocast a float32 product would be rounded to bfloat16, and the loss with it.
    """

    @functools.wraps(step)
    def inner(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return step(ctx, first, *others)

    return inner  # type: ignore[return-value]


def first_order(backward: F) -> F:
    """Make a backward pass that has no derivative of its own refuse second derivatives.

    torch's `once_differentiable` is not enough: if the incoming gradient has no graph it returns a gradient without
    one, so a second derivative of the loss would silently be zero.
    """

    @functools.wraps(backward)
    def inner(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise MinimaError(
                "a gradient of this loss with `create_graph=True`",
                "its gradient is computed in chunks that autograd does not record, so second derivatives would be zero",
                "omit create_graph, or take second derivatives of a loss over dense logits",
            )
        return backward(ctx, *gradients)

    return inner  # type: ignore[return-value]


def graph_is_kept() -> bool:
    """Whether the current backward pass keeps its graph (`retain_graph`) for another pass.

    Uses the query that torch's own compiler makes before it reuses saved tensors; True if this torch does not have it.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return torch.compiler.is_compiling() or ask is None or ask()


class ChunkBuffers:
    """Matrices of the size of one chunk's logits, allocated once and reused for every chunk.

    The allocator returns blocks of this size to the operating system as soon as they are freed, so without reuse a CPU
    would get, and have to clear, new pages for every chunk.

    Args:
        vocabulary: number of columns.
        device: where to allocate them.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str, num_tokens: int, most_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first `num_tokens` rows of the matrix `name`, which has `most_tokens`; their contents are left over."""
        if name not in self._kept:
            self._kept[name] = torch.empty(most_tokens, self._vocabulary, dtype=dtype, device=self._device)
        return self._kept[name][:num_tokens]


def logits_head(head_VD: Tensor, hidden_dtype: torch.dtype) -> Tensor:
    """The head in the dtype that `float_logits` needs for hidden states of this dtype; convert once for all chunks."""
    if hidden_dtype in _NARROW and head_VD.is_cuda:
        return head_VD.to(hidden_dtype)
    return head_VD.float()  # no CPU kernel multiplies bfloat16 with a float32 result, and no kernel float64


def float_logits(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor | None = None) -> Tensor:
    """Float32 logits [C, V], without autograd.

    Rounding them to bfloat16 would change the gradient by 18 % at a KL of 0.01 nats.

    Args:
        hidden_CD: of one chunk.
        head_VD: the output head; pass it through `logits_head` first if there are many chunks.
        out_CV: if given, it is overwritten and returned.
    """
    head_VD = logits_head(head_VD, hidden_CD.dtype)
    if head_VD.dtype == torch.float32:
        hidden_CD = hidden_CD.float()
        if not cpu_products.is_faster(hidden_CD, head_VD):
            return torch.mm(hidden_CD, head_VD.t(), out=out_CV)
        out_CV = hidden_CD.new_empty(len(hidden_CD), len(head_VD)) if out_CV is None else out_CV
        return cpu_products.product_into(out_CV, hidden_CD, head_VD)
    if out_CV is None:
        return torch.mm(hidden_CD, head_VD.t(), out_dtype=torch.float32)
    return torch.mm(hidden_CD, head_VD.t(), out_dtype=torch.float32, out=out_CV)


def add_outer(sum_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum_VD += gradient_CV^T hidden_CD, accumulated in float32."""
    if cpu_products.is_faster(gradient_CV, hidden_CD):
        cpu_products.add_transposed_product(sum_VD, gradient_CV, hidden_CD)
    elif gradient_CV.dtype == torch.float32:
        sum_VD.addmm_(gradient_CV.t(), hidden_CD)
    elif gradient_CV.is_cuda and gradient_CV.dtype in _NARROW:
        try:  # one pass over the sum, and no second matrix of its size
            torch.addmm(sum_VD, gradient_CV.t(), hidden_CD, out_dtype=torch.float32, out=sum_VD)
        except RuntimeError:  # an older torch requires the sum to have the factors' dtype
            sum_VD.add_(torch.mm(gradient_CV.t(), hidden_CD, out_dtype=torch.float32))
    else:
        sum_VD.add_(torch.mm(gradient_CV.t(), hidden_CD))


def narrowed(sum_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a finished float32 sum to `dtype` within its own memory, to save a second copy; the sum is destroyed."""
    if torch.empty(0, dtype=dtype).element_size() >= sum_VD.element_size():
        return sum_VD.to(dtype)
    wide = sum_VD.view(-1)
    narrow = wide.view(dtype)[: wide.numel()]
    for start in range(0, wide.numel(), _NARROWED_ELEMENTS):  # writes stay behind what is still to be read
        block = slice(start, start + _NARROWED_ELEMENTS)
        narrow[block] = wide[block].to(dtype)
    return narrow.view(sum_VD.shape)


def row_blocks(logits_CV: Tensor, bytes_an_element: int = 16) -> list[slice]:
    """Divide the rows of a chunk's logits into blocks of a size that suits element-wise work on their device.

    Args:
        logits_CV: of the chunk.
        bytes_an_element: memory per element that the work needs beside the logits; above 16, blocks on a GPU shrink.
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
    """Propagate the gradient of a chunk's logits to the hidden states and the head; None skips either.

    Args:
        gradient_CV: in the hidden states' dtype.
        hidden_CD: of the chunk.
        keep_C: bool; whether a token counts. The gradient of one that does not is zero, and its hidden state, which
            may not even be finite, does not enter the head's gradient.
        head_VD: the output head.
        grad_hidden_CD: is overwritten.
        grad_head_VD: float32; is added to.
    """
    if grad_hidden_CD is not None:
        head_VD = head_VD.to(hidden_CD.dtype)
        if cpu_products.is_faster(gradient_CV, head_VD):
            grad_hidden_CD.copy_(cpu_products.product(gradient_CV, head_VD.t()))
        else:
            torch.mm(gradient_CV, head_VD, out=grad_hidden_CD)
    if grad_head_VD is not None:
        add_outer(grad_head_VD, gradient_CV, hidden_CD.masked_fill(~keep_C.unsqueeze(1), 0.0))
