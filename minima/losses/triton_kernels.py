"""Softmaxes, losses and the gradient of a chunk's logits fused into one Triton kernel, with one program per row.

A row is read once for the sums of both softmaxes and once more for the losses and the gradient; every divergence other
than the forward KL needs a mean over the row before the gradient, and so a third read. These reads hit the cache or GPU
memory. Apart from the gradient, nothing of the size of a row is written.

This module needs Triton, and is imported only where it is used. Matrix products are not part of it.

Shapes: C tokens of one chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minima.losses.divergences import SoftTerm
from minima.losses.eager import Terms

# The kernel's numbers for the divergences.
_NUMBERS = {
    "forward_kl": 0, "reverse_kl": 1, "jensen_shannon": 2, "skew_forward_kl": 3, "skew_reverse_kl": 4,
    "total_variation": 5,
}  # fmt: skip
# Columns that a program holds at once: 8 per thread, at which no divergence spills more than four registers (Triton 3.5
# to 3.7, from sm_80 to sm_100).
_BLOCK_COLUMNS = 2048
# One column per thread of a small program's four warps. With fewer, two threads would hold the same column, and since
# the gradient may overwrite the logits, one thread could write before the other reads.
_FEWEST_COLUMNS = 128


def fused_losses_and_gradient(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    keep_C: Tensor,
    terms: Terms,
    sums: Tensor,
    gradient_CV: Tensor | None,
) -> None:
    """The fused version of `eager.losses_and_gradient`, its reference; does not support a truncated teacher.

    Args:
        student_CV: float32 logits, contiguous.
        teacher_CV: float32 logits, contiguous; None if the loss has no teacher part.
        labels_C: int64; any valid token id where the token is not kept.
        keep_C: which tokens count.
        terms: the loss.
        sums: float64 [3], is added to: hard, soft (times temperature squared) and KL(teacher || student).
        gradient_CV: is overwritten with the gradient of the weighted sum, in its own dtype; may be the student's
            logits. None to compute no gradient.
    """
    assert not terms.term.truncated
    num_tokens, vocabulary = student_CV.shape
    if num_tokens == 0:
        return
    losses_C3 = torch.empty(num_tokens, 3, dtype=torch.float32, device=student_CV.device)
    term: SoftTerm = terms.term
    mix = term.beta if term.divergence == "jensen_shannon" else term.alpha
    block = min(_BLOCK_COLUMNS, max(_FEWEST_COLUMNS, triton.next_power_of_2(vocabulary)))
    _rows[(num_tokens,)](
        student_CV,
        student_CV if teacher_CV is None else teacher_CV,
        student_CV if gradient_CV is None else gradient_CV,
        labels_C,
        keep_C,
        losses_C3,
        vocabulary,
        float(terms.hard),
        float(terms.soft * term.temperature),
        1.0 / term.temperature,
        float(mix),
        DIVERGENCE=_NUMBERS[term.divergence],
        HAS_HARD=terms.has_hard,
        HAS_TEACHER=teacher_CV is not None,
        NEED_GRADIENT=gradient_CV is not None,
        PLAIN_TEMPERATURE=term.temperature == 1.0,
        BLOCK=block,
        num_warps=8 if block == _BLOCK_COLUMNS else 4,
    )
    sums.add_(losses_C3.sum(0, dtype=torch.float64))


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1)."""
    return not isinstance(_rows, triton.JITFunction)


@triton.jit
def _rows(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    labels_ptr,
    keep_ptr,
    losses_ptr,
    vocabulary,
    hard_weight,
    soft_scale,
    inverse_temperature,
    mix,
    DIVERGENCE: tl.constexpr,
    HAS_HARD: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    PLAIN_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * vocabulary
    teacher_ptr += row * vocabulary
    gradient_ptr += row * vocabulary
    losses_ptr += row * 3
    columns = tl.arange(0, BLOCK)
    if tl.load(keep_ptr + row) == 0:
        # The logits of an ignored token may not be finite, so they are not read.
        for start in range(0, 3):
            tl.store(losses_ptr + start, 0.0)
        if NEED_GRADIENT:
            zero = tl.zeros([BLOCK], dtype=tl.float32).to(gradient_ptr.dtype.element_ty)
            for start in range(0, vocabulary, BLOCK):
                tl.store(gradient_ptr + start + columns, zero, mask=start + columns < vocabulary)
        return

    # Each lane keeps its own maximum and sums, so that blocks of columns need no reduction in between.
    lowest = -1.0e30  # finite, because the difference of two infinities is NaN
    s_max = tl.full([BLOCK], lowest, dtype=tl.float32)
    t_max = tl.full([BLOCK], lowest, dtype=tl.float32)
    s_sum = tl.zeros([BLOCK], dtype=tl.float32)
    q_sum = tl.zeros([BLOCK], dtype=tl.float32)
    t_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        s = tl.load(student_ptr + start + columns, mask=inside, other=float("-inf"))
        highest = tl.maximum(s_max, s)
        s_sum = s_sum * tl.exp(s_max - highest) + tl.exp(s - highest)
        if not PLAIN_TEMPERATURE:
            q_sum = q_sum * tl.exp((s_max - highest) * inverse_temperature)
            q_sum += tl.exp((s - highest) * inverse_temperature)
        s_max = highest
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + start + columns, mask=inside, other=float("-inf"))
            highest = tl.maximum(t_max, t)
            t_sum = t_sum * tl.exp((t_max - highest) * inverse_temperature)
            t_sum += tl.exp((t - highest) * inverse_temperature)
            t_max = highest
    s_top = tl.max(s_max, axis=0)
    s_log = s_top + tl.log(tl.sum(s_sum * tl.exp(s_max - s_top), axis=0))
    q_log = s_log
    if not PLAIN_TEMPERATURE:
        q_log = tl.log(tl.sum(q_sum * tl.exp((s_max - s_top) * inverse_temperature), axis=0))
        q_log += s_top * inverse_temperature
    t_top = tl.max(t_max, axis=0)
    t_log = t_top * inverse_temperature
    if HAS_TEACHER:
        t_log += tl.log(tl.sum(t_sum * tl.exp((t_max - t_top) * inverse_temperature), axis=0))

    label = tl.load(labels_ptr + row)
    # A label outside the vocabulary would read another row's logit; eager refuses it, here the loss becomes NaN.
    hard = s_log - tl.load(student_ptr + label, mask=(label >= 0) & (label < vocabulary), other=float("nan"))
    tl.debug_barrier()  # the gradient may overwrite the label's logit
    if HAS_TEACHER:
        mean = 0.0
        value = tl.zeros([BLOCK], dtype=tl.float32)
        kl = tl.zeros([BLOCK], dtype=tl.float32)
        if DIVERGENCE != 0:
            means = tl.zeros([BLOCK], dtype=tl.float32)
            for start in range(0, vocabulary, BLOCK):
                inside = start + columns < vocabulary
                s = tl.load(student_ptr + start + columns, mask=inside, other=0.0) * inverse_temperature
                t = tl.load(teacher_ptr + start + columns, mask=inside, other=0.0) * inverse_temperature
                log_q, log_p = s - q_log, t - t_log
                p, q, d = tl.exp(log_p), tl.exp(log_q), log_p - log_q
                kl += tl.where(inside, p * d, 0.0)
                here, slope = _value_and_slope(p, q, d, mix, DIVERGENCE)
                value += tl.where(inside, here, 0.0)
                means += tl.where(inside, q * slope, 0.0)
            mean = tl.sum(means, axis=0)
    if NEED_GRADIENT or (HAS_TEACHER and DIVERGENCE == 0):
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            s = tl.load(student_ptr + start + columns, mask=inside, other=0.0)
            gradient = tl.zeros([BLOCK], dtype=tl.float32)
            if HAS_TEACHER:
                t = tl.load(teacher_ptr + start + columns, mask=inside, other=0.0)
                log_q, log_p = s * inverse_temperature - q_log, t * inverse_temperature - t_log
                p, q, d = tl.exp(log_p), tl.exp(log_q), log_p - log_q
                if DIVERGENCE == 0:
                    kl += tl.where(inside, p * d, 0.0)
                    value -= tl.where(inside, p * log_q, 0.0)
                    gradient = (q - p) * soft_scale
                else:
                    here, slope = _value_and_slope(p, q, d, mix, DIVERGENCE)
                    gradient = q * (slope - mean) * soft_scale
            if NEED_GRADIENT:
                if HAS_HARD:
                    own = tl.where(start + columns == label, 1.0, 0.0)
                    # At a temperature of 1 the teacher's part has computed the same probabilities.
                    probability = q if HAS_TEACHER and PLAIN_TEMPERATURE else tl.exp(s - s_log)
                    gradient += hard_weight * (probability - own)
                out = gradient.to(gradient_ptr.dtype.element_ty)
                tl.store(gradient_ptr + start + columns, out, mask=inside)
    tl.store(losses_ptr, hard)
    if HAS_TEACHER:
        tl.store(losses_ptr + 1, tl.sum(value, axis=0) / (inverse_temperature * inverse_temperature))
        tl.store(losses_ptr + 2, tl.sum(kl, axis=0))
    else:
        tl.store(losses_ptr + 1, 0.0)
        tl.store(losses_ptr + 2, 0.0)


@triton.jit
def _value_and_slope(p, q, d, mix, DIVERGENCE: tl.constexpr):
    """Each token's share of the divergence, and its derivative by q up to a constant (see `divergences`)."""
    if DIVERGENCE == 1:  # reverse KL
        slope = -d
        value = q * slope
    elif DIVERGENCE == 2:  # Jensen-Shannon
        slope = (mix - 1.0) * _log_mix(d, mix)
        value = q * slope - mix * p * _log_mix(-d, 1.0 - mix)
    elif DIVERGENCE == 3:  # skew forward KL
        value = -p * _log_mix(-d, 1.0 - mix)
        rise = _expm1(tl.minimum(d, 80.0))
        slope = -(1.0 - mix) * (1.0 - mix) * rise / (1.0 + mix * rise)
    elif DIVERGENCE == 4:  # skew reverse KL
        log = _log_mix(d, 1.0 - mix)
        value = -q * log
        slope = -mix * _expm1(-log) - log
    else:  # total variation
        value = 0.5 * tl.abs(p - q)
        slope = tl.where(d > 0, -0.5, tl.where(d < 0, 0.5, 0.0))
    return value, slope


@triton.jit
def _log_mix(d, share):
    """log(share e^d + 1 - share)."""
    return _log1p(share * _expm1(tl.minimum(d, 80.0)))


@triton.jit
def _expm1(x):
    """e^x - 1: the Taylor series to x^9 where |x| < 1/2 (the next term is 6e-11 of x), the difference elsewhere."""
    y = tl.where(tl.abs(x) < 0.5, x, 0.0)
    series = 1.0 + y / 9.0
    for k in tl.static_range(8, 1, -1):
        series = 1.0 + y * series / k
    return tl.where(tl.abs(x) < 0.5, y * series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x): 2 artanh(s), s = x / (2 + x), to s^15 where |s| < 1/3 (the next term is 2e-9 of it), else direct."""
    s = x / (2.0 + x)
    near = tl.abs(s) < 0.33333
    s = tl.where(near, s, 0.0)
    square = s * s
    series = 1.0 / 15.0 + square * 0.0
    for k in tl.static_range(13, 0, -2):
        series = 1.0 / k + square * series
    return tl.where(near, 2.0 * s * series, tl.log(1.0 + tl.where(near, 0.0, x)))
