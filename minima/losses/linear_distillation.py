"""The distillation loss from hidden states: logits of either model exist for one chunk of tokens at a time.

Shapes: N tokens, C tokens of one chunk, D student width, E teacher width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minima.errors import VocabularyMismatch
from minima.losses.linear import add_gradients, float_logits, row_blocks
from minima.losses.loss_sum import LossSum


class _Weights(NamedTuple):
    hard: float
    soft: float
    temperature: float
    chunk_tokens: int


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
    chunk_tokens: int = 1024,
    ignore_index: int = -100,
) -> LossSum:
    """Cross-entropy with the labels plus cross-entropy with the teacher, without the logits of all tokens.

    total = sum over valid tokens of hard_weight * -log p_S(label)
            + soft_weight * temperature^2 * -sum_v p_T(v) log p_S(v), the latter with both logits over temperature
    (arXiv 2311.07052, sec. 3; the scaling by temperature squared is Hinton et al., 2015, sec. 2.1). The soft part is
    the forward KL plus the teacher's entropy, so its gradient is the forward KL's. Gradients are computed chunk by
    chunk in the forward pass and scaled in the backward pass, so no logits are kept or recomputed.

    Args:
        student_hidden_ND: final hidden states, differentiable, any float dtype; logits and softmax are float32.
        student_head_VD: output head, differentiable.
        teacher_hidden_NE: final hidden states of the teacher; no gradient.
        teacher_head_VE: output head of the teacher; no gradient.
        labels_N: int64 next tokens; those equal to `ignore_index` are in neither part and not in the count.
        hard_weight: weight of the labels' part. With a zero, that part costs nothing and is not in `parts`.
        soft_weight: weight of the teacher's part, likewise.
        temperature: divides both models' logits in the soft part.
        chunk_tokens: tokens whose logits exist at one time.
        ignore_index: label of tokens that are left out.

    Returns:
        `total` and `count`, and `parts` with the unweighted sums `hard` (nats), `soft` (nats, times temperature
        squared) and `kl` (KL(teacher || student) at `temperature`, not scaled).

    Raises:
        VocabularyMismatch: the two heads have different numbers of rows.
    """
    check_vocabularies(student_head_VD.shape[0], teacher_head_VE.shape[0])
    keep_N = labels_N != ignore_index
    count = keep_N.sum()
    weights = _Weights(hard_weight, soft_weight, temperature, chunk_tokens)
    # Ignored tokens stay in their chunk with a weight of zero: picking them out would need their number on the host.
    total, sums = _LinearDistillation.apply(
        student_hidden_ND,
        student_head_VD,
        teacher_hidden_NE.detach(),
        teacher_head_VE.detach(),
        labels_N,
        keep_N,
        weights,
    )
    parts = {"hard": sums[0]} if hard_weight else {}
    if soft_weight:
        parts |= {"soft": sums[1], "kl": sums[2]}
    return LossSum(total, count, parts)


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int = 1024,
    ignore_index: int = -100,
) -> LossSum:
    """Next-token cross-entropy from hidden states, without the logits of all tokens.

    Args:
        hidden_ND: final hidden states, differentiable, any float dtype; logits and softmax are float32.
        head_VD: output head, differentiable.
        labels_N: int64 next tokens; those equal to `ignore_index` are left out.
        chunk_tokens: tokens whose logits exist at one time.
        ignore_index: label of tokens that are left out.

    Returns:
        Sum of -log p(label) over the valid tokens in nats, and their count; no parts.
    """
    keep_N = labels_N != ignore_index
    weights = _Weights(1.0, 0.0, 1.0, chunk_tokens)
    total, _ = _LinearDistillation.apply(hidden_ND, head_VD, None, None, labels_N, keep_N, weights)
    return LossSum(total, keep_N.sum(), {})


def linear_agreement(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int = 1024,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """How far a student follows a teacher over the valid tokens; no gradients.

    Args:
        student_hidden_ND: as for `linear_distillation_loss`, and so are the other arguments.

    Returns:
        Sums over valid tokens: `kl`, KL(teacher || student) in nats; `same_top1`, tokens on which both models' most
        likely next tokens agree; `count`, valid tokens.

    Raises:
        VocabularyMismatch: the two heads have different numbers of rows.
    """
    check_vocabularies(student_head_VD.shape[0], teacher_head_VE.shape[0])
    keep_N = labels_N != ignore_index
    kl = torch.zeros((), dtype=torch.float64, device=labels_N.device)
    same = torch.zeros((), dtype=torch.int64, device=labels_N.device)
    with torch.no_grad():
        for start in range(0, labels_N.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            student_CV = float_logits(student_hidden_ND[chunk], student_head_VD)
            teacher_CV = float_logits(teacher_hidden_NE[chunk], teacher_head_VE)
            same += ((student_CV.argmax(-1) == teacher_CV.argmax(-1)) & keep_N[chunk]).sum()
            log_student_CV, log_teacher_CV = student_CV.log_softmax(-1), teacher_CV.log_softmax(-1)
            kl_C = (log_teacher_CV.exp() * (log_teacher_CV - log_student_CV)).sum(-1)
            kl += kl_C.masked_fill(~keep_N[chunk], 0.0).sum()
    return {"kl": kl, "same_top1": same, "count": keep_N.sum()}


def check_vocabularies(student_size: int, teacher_size: int) -> None:
    """Refuse two models whose logits cannot be compared.

    Raises:
        VocabularyMismatch: the sizes differ.
    """
    if student_size != teacher_size:
        raise VocabularyMismatch(
            f"the student's vocabulary has {student_size} tokens, the teacher's {teacher_size}",
            "their predictions are compared token by token, so both must be over the same tokens",
            "give both the same tokenizer: expand the smaller vocabulary, or prune the student from this teacher",
        )


class _LinearDistillation(torch.autograd.Function):
    """Sum of the loss, and its gradients for hidden states and head, chunk by chunk.

    Of the size of a chunk's logits there are two buffers, student's and teacher's; the gradient overwrites the first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_ND: Tensor,
        student_head_VD: Tensor,
        teacher_hidden_NE: Tensor | None,
        teacher_head_VE: Tensor | None,
        labels_N: Tensor,
        keep_N: Tensor,
        weights: _Weights,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        labels_N = labels_N.masked_fill(~keep_N, 0)
        sums = torch.zeros(3, dtype=torch.float64, device=student_hidden_ND.device)  # hard, soft (scaled), kl
        grad_hidden_ND = torch.zeros_like(student_hidden_ND) if need_hidden else None
        grad_head_VD = torch.zeros_like(student_head_VD, dtype=torch.float32) if need_head else None
        for start in range(0, labels_N.shape[0], weights.chunk_tokens):
            chunk = slice(start, start + weights.chunk_tokens)
            hidden_CD = student_hidden_ND[chunk]
            student_CV = float_logits(hidden_CD, student_head_VD)
            teacher_CV = None
            if weights.soft and teacher_hidden_NE is not None and teacher_head_VE is not None:
                teacher_CV = float_logits(teacher_hidden_NE[chunk], teacher_head_VE)
            _losses_and_gradient(
                student_CV, teacher_CV, labels_N[chunk], keep_N[chunk], weights, sums, need_hidden or need_head
            )
            del teacher_CV
            gradient_CV = student_CV.to(hidden_CD.dtype)
            grad_hidden_CD = None if grad_hidden_ND is None else grad_hidden_ND[chunk]
            add_gradients(gradient_CV, hidden_CD, student_head_VD, grad_hidden_CD, grad_head_VD)
            del student_CV, gradient_CV
        ctx.head_dtype = student_head_VD.dtype
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        total = weights.hard * sums[0] + weights.soft * sums[1]
        parts = sums.float()
        ctx.mark_non_differentiable(parts)
        return total.float(), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        # Scaled in place, which spares a copy of each: they belong to this node alone, and autograd refuses a second
        # backward pass through them.
        if grad_hidden_ND is not None:
            grad_hidden_ND.mul_(grad_total)
        if grad_head_VD is not None:
            grad_head_VD = grad_head_VD.mul_(grad_total).to(ctx.head_dtype)
        return grad_hidden_ND, grad_head_VD, None, None, None, None, None


def _losses_and_gradient(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    keep_C: Tensor,
    weights: _Weights,
    sums: Tensor,
    need_gradient: bool,
) -> None:
    """Add one chunk's losses to `sums`, and overwrite the student's logits with the gradient of the weighted sum."""
    tau, soft_scale = weights.temperature, weights.soft * weights.temperature
    for block in row_blocks(student_CV):
        logits_RV, keep_R = student_CV[block], keep_C[block]
        label_R1 = labels_C[block].unsqueeze(1)
        log_p_RV = logits_RV.log_softmax(-1)
        if weights.hard:
            sums[0] -= log_p_RV.gather(1, label_R1).squeeze(1).masked_fill(~keep_R, 0.0).sum(dtype=torch.float64)
        if teacher_CV is None:
            if need_gradient:
                torch.exp(log_p_RV, out=logits_RV)
                logits_RV.mul_(weights.hard)
        else:
            log_q_RV = log_p_RV if tau == 1.0 else (logits_RV / tau).log_softmax(-1)
            log_t_RV = (teacher_CV[block] if tau == 1.0 else teacher_CV[block] / tau).log_softmax(-1)
            p_t_RV = log_t_RV.exp()
            cross_R = -(p_t_RV * log_q_RV).sum(-1)
            negative_entropy_R = log_t_RV.mul_(p_t_RV).sum(-1)
            cross = cross_R.masked_fill(~keep_R, 0.0).sum(dtype=torch.float64)
            sums[1] += tau * tau * cross
            sums[2] += cross + negative_entropy_R.masked_fill(~keep_R, 0.0).sum(dtype=torch.float64)
            if need_gradient:
                torch.exp(log_q_RV, out=logits_RV)
                if tau == 1.0:
                    logits_RV.mul_(weights.hard + weights.soft)
                else:
                    logits_RV.mul_(soft_scale).add_(log_p_RV.exp_(), alpha=weights.hard)
                logits_RV.sub_(p_t_RV, alpha=soft_scale)
        if need_gradient:
            if weights.hard:
                logits_RV.scatter_(1, label_R1, logits_RV.gather(1, label_R1) - weights.hard)
            logits_RV.masked_fill_(~keep_R.unsqueeze(1), 0.0)
