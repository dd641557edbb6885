"""Matrix products between hidden states and an output head, with sums and results in float32.

Shapes: C tokens of one chunk, D width, V vocabulary.
"""

import torch
from torch import Tensor

# Elements of one block of rows in the element-wise part of a loss: on a CPU a block and its temporaries stay in the
# cache (2^17 float32 numbers are 0.5 MB); a GPU wants few, large kernels.
_BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**25}


def float_logits(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    """Float32 logits [C, V]. Rounding them to bfloat16 would cost 18 % of the gradient at a KL of 0.01 nats."""
    if hidden_CD.dtype == torch.float32:
        return hidden_CD @ head_VD.to(torch.float32).t()
    if hidden_CD.is_cuda:
        return torch.mm(hidden_CD, head_VD.to(hidden_CD.dtype).t(), out_dtype=torch.float32)
    return hidden_CD.float() @ head_VD.float().t()  # no CPU kernel multiplies bfloat16 into float32


def add_outer(sum_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum_VD += gradient_CV^T hidden_CD, with the sum in float32."""
    if gradient_CV.dtype == torch.float32:
        sum_VD.addmm_(gradient_CV.t(), hidden_CD)
    elif gradient_CV.is_cuda:
        sum_VD.add_(torch.mm(gradient_CV.t(), hidden_CD, out_dtype=torch.float32))
    else:
        sum_VD.add_(torch.mm(gradient_CV.t(), hidden_CD))


def row_blocks(logits_CV: Tensor) -> list[slice]:
    """The rows of a chunk's logits in blocks of a size that suits element-wise work on their device."""
    num_tokens, vocabulary = logits_CV.shape
    rows = max(1, _BLOCK_ELEMENTS[logits_CV.device.type] // vocabulary)
    return [slice(start, start + rows) for start in range(0, num_tokens, rows)]


def add_gradients(
    gradient_CV: Tensor,
    hidden_CD: Tensor,
    head_VD: Tensor,
    grad_hidden_CD: Tensor | None,
    grad_head_VD: Tensor | None,
) -> None:
    """What the gradient of a chunk's logits is for the hidden states and for the head, where each is wanted.

    Args:
        gradient_CV: in the hidden states' dtype.
        hidden_CD: of the chunk.
        head_VD: the output head.
        grad_hidden_CD: is overwritten.
        grad_head_VD: float32; is added to.
    """
    if grad_hidden_CD is not None:
        torch.mm(gradient_CV, head_VD.to(hidden_CD.dtype), out=grad_hidden_CD)
    if grad_head_VD is not None:
        add_outer(grad_head_VD, gradient_CV, hidden_CD)
