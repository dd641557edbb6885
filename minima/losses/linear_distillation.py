"""The distillation loss from hidden states; logits are materialised for one chunk of tokens at a time.

Shapes: N tokens, C tokens of one chunk, P tokens of a piece of it, D student width, E teacher width, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from minima.batch import IGNORE_INDEX
from minima.errors import VocabularyMismatch
from minima.losses.checks import check_ranges, check_tokens, is_number
from minima.losses.divergences import DivergenceName, SoftTerm
from minima.losses.eager import Terms, losses_and_gradient
from minima.losses.linear import (
    ChunkBuffers,
    add_gradients,
    first_order,
    float_logits,
    graph_is_kept,
    logits_head,
    narrowed,
    without_autocast,
)
from minima.losses.loss_sum import LossSum
from minima.losses.way import Kernel, Way

# Pieces per chunk. With four, a piece's logits of both models together are as large as the chunk's rounded gradient.
_PIECES = {"cpu": 1, "cuda": 4}


def linear_distillation_loss(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    labels_N: Tensor,
    *,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    temperature: float = 1.0,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    top_k: int | None = None,
    top_p: float | None = None,
    chunk_tokens: int = 1024,
    ignore_index: int = IGNORE_INDEX,
    zero_parts: bool = False,
    kernel: Kernel = "auto",
) -> LossSum:
    """Cross-entropy with the labels plus a divergence from the teacher; the logits of all tokens never exist at once.

    total = sum over valid tokens of hard_weight * -log p_S(label)
            + soft_weight * temperature^2 * D, with both models' logits divided by the temperature in D
    (the scaling by temperature squared is from Hinton et al., 2015, sec. 2.1). Gradients are computed chunk by chunk in
    the forward pass and scaled in the backward pass, so no logits are stored or recomputed. With the teacher's
    distribution T and the student's S, `divergence` selects D:

    - `forward_kl`: -sum_v T(v) log S(v), as published (arXiv 2311.07052, sec. 3). This is KL(T || S) plus the
      teacher's entropy, so its gradient is that of the forward KL;
    - `reverse_kl`: KL(S || T);
    - `jensen_shannon`: beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S (GKD, arXiv 2306.13649,
      eq. 1, and TRL's `generalized_jsd_loss`). Divided by beta it tends to the forward KL as beta falls to 0; the two
      limits are separate divergences here;
    - `skew_forward_kl`: KL(T || alpha T + (1 - alpha) S), and
    - `skew_reverse_kl`: KL(S || alpha S + (1 - alpha) T) (DistiLLM, arXiv 2402.03898, sec. 3.1);
    - `total_variation`: sum_v |T(v) - S(v)| / 2.

    With `top_k` or `top_p`, all other tokens are merged into one tail bucket, for teacher and student alike, and D is
    taken over the kept tokens and this bucket.

    Args:
        student_hidden_ND: final hidden states, differentiable, any float dtype; logits and softmax are float32.
        student_head_VD: output head, differentiable.
        teacher_hidden_NE: final hidden states of the teacher; no gradient.
        teacher_head_VE: output head of the teacher; no gradient.
        labels_N: int64 next tokens; those equal to `ignore_index` enter neither part nor the count.
        hard_weight: weight of the labels' part. If it is zero, that part is not computed and not in `parts`.
        soft_weight: weight of the teacher's part, likewise.
        temperature: divides both models' logits in the soft part.
        divergence: selects D.
        beta: for `jensen_shannon` only; between 0 and 1, both excluded.
        alpha: for the skew divergences only; between 0 and 1, both excluded. 0.1 is the value of their paper.
        top_k: keep this many of the teacher's likeliest tokens; None keeps all.
        top_p: keep the smallest set of the teacher's likeliest tokens whose probability at `temperature` is at least
            this; above 0, and 1 keeps all. Combined with `top_k`, the smaller set is kept.
        chunk_tokens: number of tokens whose logits exist at one time.
        ignore_index: label of tokens that are left out.
        zero_parts: also compute a part whose weight is 0, for `parts`.
        kernel: `triton` fuses everything between the logits and their gradient, but does not support a truncated
            teacher; `eager` is plain torch. `auto` is `triton` on a GPU where it is possible, else `eager`.

    Returns:
        `total` and `count`, and `parts` with the unweighted sums `hard` (nats), `soft` (nats, times temperature
        squared) and `kl` (KL(teacher || student) over all tokens at `temperature`, not scaled).

    Raises:
        VocabularyMismatch: the two heads have different numbers of rows.
        MinimaError: the numbers of tokens or the widths do not match, or an argument is invalid.
    """
    check_vocabularies(student_head_VD.shape[0], teacher_head_VE.shape[0])
    student, teacher = (student_hidden_ND, student_head_VD), (teacher_hidden_NE, teacher_head_VE)
    check_tokens(labels_N, ignore_index, student=student, teacher=teacher)
    term, way = SoftTerm(divergence, temperature, beta, alpha, top_k, top_p), Way(chunk_tokens, kernel)
    term.check()
    if term.top_k is not None and term.top_k >= teacher_head_VE.shape[0]:
        term = term._replace(top_k=None)  # equivalent, and the fused kernel supports it
    if term.top_p == 1:
        term = term._replace(top_p=None)
    way.check(labels_N.device, term.truncated)
    weights = {"hard_weight": hard_weight, "soft_weight": soft_weight}
    check_ranges(
        "a distillation loss",
        **{key: (w, is_number(w) and 0 <= w < math.inf, "0 or more, and finite") for key, w in weights.items()},
    )
    keep_N = labels_N != ignore_index
    count = keep_N.sum()
    terms = Terms(hard_weight, soft_weight, term, zero_parts)
    # Ignored tokens stay in their chunk with a weight of zero: removing them would need their count on the host.
    total, sums = _LinearDistillation.apply(
        student_hidden_ND,
        student_head_VD,
        teacher_hidden_NE.detach(),
        teacher_head_VE.detach(),
        labels_N,
        keep_N,
        terms,
        way,
    )
    parts = {"hard": sums[0]} if terms.has_hard else {}
    if terms.has_soft:
        parts |= {"soft": sums[1], "kl": sums[2]}
    return LossSum(total, count, parts)


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int = 1024,
    ignore_index: int = IGNORE_INDEX,
    kernel: Kernel = "auto",
) -> LossSum:
    """Next-token cross-entropy from hidden states; the logits of all tokens never exist at once.

    Args:
        hidden_ND: final hidden states, differentiable, any float dtype; logits and softmax are float32.
        head_VD: output head, differentiable.
        labels_N: int64 next tokens; those equal to `ignore_index` are left out.
        chunk_tokens: number of tokens whose logits exist at one time.
        ignore_index: label of tokens that are left out.
        kernel: as for `linear_distillation_loss`.

    Returns:
        Sum of -log p(label) over the valid tokens in nats, and their count; no parts.

    Raises:
        MinimaError: as for `linear_distillation_loss`.
    """
    check_tokens(labels_N, ignore_index, model=(hidden_ND, head_VD))
    terms, way = Terms(1.0, 0.0, SoftTerm()), Way(chunk_tokens, kernel)
    way.check(labels_N.device)
    keep_N = labels_N != ignore_index
    total, _ = _LinearDistillation.apply(hidden_ND, head_VD, None, None, labels_N, keep_N, terms, way)
    return LossSum(total, keep_N.sum(), {})


def check_vocabularies(student_size: int, teacher_size: int) -> None:
    """Refuse two models whose logits cannot be compared.

    Raises:
        VocabularyMismatch: the sizes differ.
    """
    if student_size != teacher_size:
        raise VocabularyMismatch(
            f"the student's vocabulary has {student_size} tokens, the teacher's {teacher_size}",
            "their predictions are compared token by token, so both must cover the same vocabulary",
            VocabularyMismatch.DO,
        )


def _piece_tokens(chunk_tokens: int, device: torch.device) -> int:
    """Number of tokens whose logits exist at one time if their gradient has a buffer of its own."""
    return -(-chunk_tokens // _PIECES.get(device.type, 1))


class _LinearDistillation(torch.autograd.Function):
    """The summed loss and its gradients with respect to hidden states and head, computed chunk by chunk.

    There are two buffers of the size of a chunk's logits, for student and teacher. The gradient overwrites the
    student's; if the hidden states are not float32, it is instead rounded into a third buffer of half that size, in the
    dtype that the matrix products need. On a GPU the logits are then computed for one piece of the chunk at a time.
    Only the gradient covers the whole chunk, because each product with it passes over the head's float32 gradient.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        student_hidden_ND: Tensor,
        student_head_VD: Tensor,
        teacher_hidden_NE: Tensor | None,
        teacher_head_VE: Tensor | None,
        labels_N: Tensor,
        keep_N: Tensor,
        terms: Terms,
        way: Way,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        need_gradient = need_hidden or need_head
        num_tokens, dtype = labels_N.shape[0], student_hidden_ND.dtype
        labels_N = labels_N.masked_fill(~keep_N, 0)
        sums = torch.zeros(3, dtype=torch.float64, device=labels_N.device)  # hard, soft (scaled), kl
        grad_hidden_ND = torch.zeros_like(student_hidden_ND) if need_hidden else None
        grad_head_VD = None
        if need_head:  # contiguous, whatever the head's strides: `narrowed` works within the sum's own memory
            grad_head_VD = torch.zeros(student_head_VD.shape, dtype=torch.float32, device=student_head_VD.device)
        fused = way.is_fused(labels_N.device, terms.term.truncated)
        if fused:
            from minima.losses.triton_kernels import fused_losses_and_gradient
        chunk_tokens = min(way.chunk_tokens, num_tokens)
        rounded = need_gradient and dtype != torch.float32
        piece_tokens = _piece_tokens(chunk_tokens, labels_N.device) if rounded else chunk_tokens
        buffers = ChunkBuffers(student_head_VD.shape[0], labels_N.device)
        student_float_VD = logits_head(student_head_VD, dtype)
        if terms.has_soft and teacher_hidden_NE is not None and teacher_head_VE is not None:
            teacher_float_VE = logits_head(teacher_head_VE, teacher_hidden_NE.dtype)
        else:
            teacher_hidden_NE = None
        for start in range(0, num_tokens, way.chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, num_tokens))
            rounded_CV = buffers.get("gradient", chunk.stop - start, chunk_tokens, dtype) if rounded else None
            for first in range(start, chunk.stop, piece_tokens):
                piece = slice(first, min(first + piece_tokens, chunk.stop))
                size = (piece.stop - first, piece_tokens)
                student_PV = float_logits(student_hidden_ND[piece], student_float_VD, buffers.get("student", *size))
                teacher_PV = None
                if teacher_hidden_NE is not None:
                    teacher_PV = float_logits(teacher_hidden_NE[piece], teacher_float_VE, buffers.get("teacher", *size))
                gradient_PV = student_PV if rounded_CV is None else rounded_CV[first - start : piece.stop - start]
                given = (student_PV, teacher_PV, labels_N[piece], keep_N[piece], terms, sums)
                if fused:
                    fused_losses_and_gradient(*given, gradient_PV if need_gradient else None)
                else:
                    losses_and_gradient(*given, need_gradient)
                    if rounded_CV is not None:
                        gradient_PV.copy_(student_PV)
            if need_gradient:
                gradient_CV = student_PV if rounded_CV is None else rounded_CV
                grad_hidden_CD = None if grad_hidden_ND is None else grad_hidden_ND[chunk]
                hidden_CD, keep_C = student_hidden_ND[chunk], keep_N[chunk]
                add_gradients(gradient_CV, hidden_CD, keep_C, student_head_VD, grad_hidden_CD, grad_head_VD)
        ctx.head_dtype = student_head_VD.dtype
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        total = terms.hard * sums[0] + terms.soft * sums[1]
        parts = sums.float()
        ctx.mark_non_differentiable(parts)
        return total.float(), parts

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        # Scale in place, which saves a copy of each, unless another backward pass will read them.
        scaled = torch.mul if graph_is_kept() else Tensor.mul_
        if grad_hidden_ND is not None:
            grad_hidden_ND = scaled(grad_hidden_ND, grad_total)
        if grad_head_VD is not None:
            grad_head_VD = narrowed(scaled(grad_head_VD, grad_total), ctx.head_dtype)
        return grad_hidden_ND, grad_head_VD, *(None,) * 6
