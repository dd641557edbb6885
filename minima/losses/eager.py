"""A chunk's losses and the gradient of its logits in plain torch: the reference for the Triton kernel.

Shapes: C tokens of one chunk, R rows of one block of a chunk, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minima.losses.divergences import SoftTerm, divergence_and_slope, one_tail
from minima.losses.linear import row_blocks


class Terms(NamedTuple):
    """The weighted terms of a loss.

    Attributes:
        hard: weight of the cross-entropy with the labels.
        soft: weight of the teacher's part.
        term: definition of the teacher's part.
        zero_parts: also compute a part whose weight is 0.
    """

    hard: float
    soft: float
    term: SoftTerm
    zero_parts: bool = False

    @property
    def has_hard(self) -> bool:
        return bool(self.hard) or self.zero_parts

    @property
    def has_soft(self) -> bool:
        return bool(self.soft) or self.zero_parts


def losses_and_gradient(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    keep_C: Tensor,
    terms: Terms,
    sums: Tensor,
    need_gradient: bool,
) -> None:
    """Add one chunk's losses to `sums`, and overwrite the student's logits with the gradient of the weighted sum.

    Args:
        student_CV: float32 logits.
        teacher_CV: float32 logits, which may be overwritten; None if the loss has no teacher part.
        labels_C: int64; any valid token id where the token is not kept.
        keep_C: which tokens count.
        terms: the loss.
        sums: float64 [3]: hard, soft (times temperature squared) and KL(teacher || student).
        need_gradient: if False, the student's logits stay unchanged.
    """
    tau, published = terms.term.temperature, terms.term.plain_forward_kl
    # Finding a teacher's top tokens takes 8-byte indices and sums and a few more copies, hence 64 bytes per element.
    for block in row_blocks(student_CV, 64 if terms.term.truncated else 16):
        logits_RV, keep_R = student_CV[block], keep_C[block]
        label_R1 = labels_C[block].unsqueeze(1)
        if teacher_CV is None:
            _labels_alone(logits_RV, label_R1, keep_R, terms, sums, need_gradient)
        elif published and tau == 1.0:
            _published_loss(logits_RV, teacher_CV[block], label_R1, keep_R, terms, sums, need_gradient)
        else:
            _general_loss(logits_RV, teacher_CV[block], label_R1, keep_R, terms, sums, need_gradient)
        if need_gradient:
            if terms.hard:
                logits_RV.scatter_(1, label_R1, logits_RV.gather(1, label_R1) - terms.hard)
            # Zero the rows that do not count, finite or not. On a CPU this takes a tenth of masked_fill_'s time.
            logits_RV.view(torch.int32).bitwise_and_(-keep_R.int().unsqueeze(1))


def _labels_alone(
    logits_RV: Tensor, label_R1: Tensor, keep_R: Tensor, terms: Terms, sums: Tensor, need_gradient: bool
) -> None:
    """Cross-entropy with the labels, and its gradient without the label's term."""
    p_RV = logits_RV.softmax(-1)
    log_sum_R = logits_RV.amax(-1) - p_RV.amax(-1).log()
    sums[0] += _kept_sum(log_sum_R - logits_RV.gather(1, label_R1).squeeze(1), keep_R)
    if need_gradient:
        torch.mul(p_RV, terms.hard, out=logits_RV)


def _published_loss(
    logits_RV: Tensor,
    teacher_RV: Tensor,
    label_R1: Tensor,
    keep_R: Tensor,
    terms: Terms,
    sums: Tensor,
    need_gradient: bool,
) -> None:
    """Both parts of the published loss, and its gradient without the label's term, from one softmax per model.

    The log-sum-exp follows from the largest probability, which is exp(largest logit - log-sum-exp), so no logarithm of
    a whole row is needed. The teacher's logits are replaced by their difference from the student's, so that a small
    divergence is not computed as the difference of two large numbers.
    """
    p_t_RV, p_s_RV = teacher_RV.softmax(-1), logits_RV.softmax(-1)
    log_sum_s_R = logits_RV.amax(-1) - p_s_RV.amax(-1).log()
    log_sum_t_R = teacher_RV.amax(-1) - p_t_RV.amax(-1).log()
    if terms.has_hard:
        sums[0] += _kept_sum(log_sum_s_R - logits_RV.gather(1, label_R1).squeeze(1), keep_R)
    sums[1] += _kept_sum(log_sum_s_R - torch.linalg.vecdot(p_t_RV, logits_RV), keep_R)
    kl_R = torch.linalg.vecdot(p_t_RV, teacher_RV.sub_(logits_RV)) + (log_sum_s_R - log_sum_t_R)
    sums[2] += _kept_sum(kl_R, keep_R)
    if need_gradient:
        torch.sub(p_s_RV.mul_(terms.hard + terms.soft), p_t_RV, alpha=terms.soft, out=logits_RV)


def _general_loss(
    logits_RV: Tensor,
    teacher_RV: Tensor,
    label_R1: Tensor,
    keep_R: Tensor,
    terms: Terms,
    sums: Tensor,
    need_gradient: bool,
) -> None:
    """Any loss at any temperature, and its gradient without the label's term."""
    tau, scale = terms.term.temperature, terms.soft * terms.term.temperature
    published = terms.term.plain_forward_kl
    log_p_RV = logits_RV.log_softmax(-1) if terms.has_hard or tau == 1.0 else None
    if terms.has_hard:
        assert log_p_RV is not None
        sums[0] -= _kept_sum(log_p_RV.gather(1, label_R1).squeeze(1), keep_R)
    log_q_RV = (logits_RV / tau).log_softmax(-1) if log_p_RV is None or tau != 1.0 else log_p_RV
    log_t_RV = (teacher_RV if tau == 1.0 else teacher_RV / tau).log_softmax(-1)
    if published:
        p_t_RV = log_t_RV.exp()
        cross = _kept_sum(-(p_t_RV * log_q_RV).sum(-1), keep_R)
        sums[1] += tau * tau * cross
        sums[2] += cross + _kept_sum(log_t_RV.mul_(p_t_RV).sum(-1), keep_R)
        if need_gradient:
            torch.exp(log_q_RV, out=logits_RV)
            logits_RV.mul_(scale).sub_(p_t_RV, alpha=scale)
    else:
        slope_RV = _other_soft_part(log_t_RV, log_q_RV, keep_R, terms.term, sums)
        if need_gradient:
            torch.mul(slope_RV, scale, out=logits_RV)
    if need_gradient and terms.hard:
        assert log_p_RV is not None
        logits_RV.add_(log_p_RV.exp_(), alpha=terms.hard)


def _other_soft_part(log_t_RV: Tensor, log_q_RV: Tensor, keep_R: Tensor, term: SoftTerm, sums: Tensor) -> Tensor:
    """Add the soft part to `sums`; return the gradient [R, V] with respect to the student's logits over temperature."""
    kl = _kept_sum((log_t_RV.exp() * (log_t_RV - log_q_RV)).sum(-1), keep_R)
    entropy_R = None
    if term.truncated:
        log_t_RV, entropy_R = one_tail(log_t_RV, log_q_RV, term)
    value_R, slope_RV = divergence_and_slope(log_t_RV, log_q_RV, term)
    if term.divergence == "forward_kl" and entropy_R is not None:
        value_R = value_R + entropy_R  # a cross-entropy, as without truncation
    sums[1] += term.temperature**2 * _kept_sum(value_R, keep_R)
    sums[2] += kl
    return slope_RV


def _kept_sum(values_R: Tensor, keep_R: Tensor) -> Tensor:
    return values_R.masked_fill(~keep_R, 0.0).sum(dtype=torch.float64)
