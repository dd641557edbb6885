"""Six divergences of a student's distribution from a teacher's, and the truncation of a teacher to its top tokens.

Shapes: R rows of one block of a chunk, V vocabulary. p is the teacher's distribution, q the student's, both at the
temperature; d = log p - log q. Every divergence here is a sum of q F(p / q), and its gradient with respect to the
student's logits is q (g - sum q g), where g is its derivative with respect to q. A constant in g cancels, so each g
below is chosen to vanish where p = q and is written in terms of d: late in training p and q agree in all but their last
digits, and the difference of two logarithms would be mostly rounding error.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minima.losses.checks import check_ranges, is_between, is_count

DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]

_ONE = 2.0**52  # a probability of 1 in fixed point; the rounding is finer than that of a double
# exp(80) still fits in float32. Where p/q exceeds it, the terms in q are below 1e-34 whatever d is, so d is clamped;
# likewise for q/p.
_LARGEST = 80.0


class SoftTerm(NamedTuple):
    """The teacher's part (the soft part) of a loss.

    Attributes:
        divergence: its name.
        temperature: divides both models' logits; the part is scaled by its square.
        beta: the teacher's weight in `jensen_shannon`.
        alpha: the mixing weight of the skew divergences.
        top_k: how many of the teacher's likeliest tokens are kept; the rest form one bucket. None keeps all.
        top_p: keep the smallest set of likeliest tokens with at least this probability; None keeps all.
    """

    divergence: DivergenceName = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Refuse invalid settings.

        Raises:
            MinimaError: the divergence is unknown, or a number is out of range.
        """
        names = get_args(DivergenceName)
        top_k, top_p = self.top_k, self.top_p
        check_ranges(
            "a distillation loss",
            divergence=(self.divergence, self.divergence in names, f"one of {', '.join(names)}"),
            temperature=(
                self.temperature,
                is_between(self.temperature, 0, math.inf),
                "above 0 and finite: it divides logits",
            ),
            beta=(
                self.beta,
                is_between(self.beta, 0, 1),
                "between 0 and 1, both excluded; for the limits use forward_kl and reverse_kl",
            ),
            alpha=(
                self.alpha,
                is_between(self.alpha, 0, 1),
                "between 0 and 1, both excluded: 0 is forward_kl or reverse_kl, and at 1 the divergence is always 0",
            ),
            top_k=(top_k, top_k is None or is_count(top_k), "a whole number of at least 1, or None for all tokens"),
            top_p=(
                top_p,
                top_p is None or is_between(top_p, 0, 1) or top_p == 1,
                "above 0 and at most 1; 1 or None keeps all tokens",
            ),
        )

    @property
    def truncated(self) -> bool:
        """Whether the teacher's less likely tokens are merged into one bucket."""
        return self.top_k is not None or self.top_p is not None

    @property
    def plain_forward_kl(self) -> bool:
        """Whether this is the published loss, whose gradient is the student's minus the teacher's probabilities."""
        return self.divergence == "forward_kl" and not self.truncated


def divergence_and_slope(log_p_RV: Tensor, log_q_RV: Tensor, soft: SoftTerm) -> tuple[Tensor, Tensor]:
    """The divergence of each row in nats, and its gradient with respect to the student's logits over temperature.

    Args:
        log_p_RV: the teacher's log-probabilities; from `one_tail` if the teacher is truncated.
        log_q_RV: the student's.
        soft: names the divergence; its temperature is ignored.

    Returns:
        [R] and [R, V], both float32.
    """
    q_RV = log_q_RV.exp()
    d_RV = log_p_RV - log_q_RV
    if soft.divergence == "forward_kl":
        p_RV = log_p_RV.exp()
        return (p_RV * d_RV).sum(-1), q_RV.sub_(p_RV)
    if soft.divergence == "reverse_kl":
        slope_RV = d_RV.neg_()
        value_R = (q_RV * slope_RV).sum(-1)
        return value_R, slope_RV.sub_(value_R.unsqueeze(-1)).mul_(q_RV)
    if soft.divergence == "total_variation":
        value_R = (log_p_RV.exp() - q_RV).abs().sum(-1) / 2
        slope_RV = d_RV.sign_().mul_(-0.5)
    elif soft.divergence == "jensen_shannon":
        beta = soft.beta
        slope_RV = _log_mix(d_RV, beta).mul_(beta - 1)  # (1 - beta) log(q / m)
        value_R = (q_RV * slope_RV).sum(-1) - beta * (log_p_RV.exp() * _log_mix(-d_RV, 1 - beta)).sum(-1)
    elif soft.divergence == "skew_forward_kl":
        alpha = soft.alpha
        value_R = -(log_p_RV.exp() * _log_mix(-d_RV, 1 - alpha)).sum(-1)
        rise_RV = d_RV.clamp_(max=_LARGEST).expm1_()
        slope_RV = rise_RV.div_(alpha * rise_RV + 1).mul_(-((1 - alpha) ** 2))
    else:
        alpha = soft.alpha
        log_RV = _log_mix(d_RV, 1 - alpha)  # log(m / q)
        value_R = -(q_RV * log_RV).sum(-1)
        slope_RV = (-log_RV).expm1_().mul_(-alpha).sub_(log_RV)  # log(q / m) + alpha (1 - q / m)
    mean_R1 = (q_RV * slope_RV).sum(-1, keepdim=True)
    return value_R, slope_RV.sub_(mean_R1).mul_(q_RV)


def _log_mix(d_RV: Tensor, share: float) -> Tensor:
    """log(share e^d + 1 - share)."""
    return d_RV.clamp(max=_LARGEST).expm1_().mul_(share).log1p_()


def one_tail(log_p_RV: Tensor, log_q_RV: Tensor, soft: SoftTerm) -> tuple[Tensor, Tensor]:
    """Merge all but the teacher's top tokens into one bucket, with the student's tail merged in the same way.

    A token in the bucket affects a divergence only through the bucket's ratio p* / q*. So a teacher that splits its
    bucket among the tokens in the student's proportions, p* q / q*, gives the same divergence and the same gradient
    when it is evaluated over all tokens.

    Args:
        log_p_RV: the teacher's log-probabilities.
        log_q_RV: the student's.
        soft: has `top_k`, `top_p` or both; with both, the smaller set is kept.

    Returns:
        That teacher's log-probabilities [R, V], and its entropy over top tokens and bucket [R].
    """
    top_RV = _top(log_p_RV, soft)
    log_tail_p_R1 = log_p_RV.masked_fill(top_RV, float("-inf")).logsumexp(-1, keepdim=True)
    log_tail_q_R1 = log_q_RV.masked_fill(top_RV, float("-inf")).logsumexp(-1, keepdim=True)
    log_cut_p_RV = torch.where(top_RV, log_p_RV, log_q_RV + (log_tail_p_R1 - log_tail_q_R1))
    own_RV = (log_p_RV.exp() * log_p_RV).masked_fill(~top_RV, 0.0)
    tail_R = torch.special.entr(log_tail_p_R1.exp()).squeeze(-1)
    return log_cut_p_RV, tail_R - own_RV.sum(-1)


def _top(log_p_RV: Tensor, soft: SoftTerm) -> Tensor:
    """True at each row's top tokens, of which there is at least one."""
    vocabulary = log_p_RV.shape[-1]
    most = vocabulary if soft.top_k is None else min(soft.top_k, vocabulary)
    # On a GPU, finding out how many tokens suffice would force a sync. A CPU can check cheaply, and sorting the whole
    # row is what costs it time.
    tried = most if log_p_RV.is_cuda or soft.top_p is None else min(most, 256)
    while True:
        log_top_RK, index_RK = log_p_RV.topk(tried, dim=-1)
        taken_RK = torch.ones_like(index_RK, dtype=torch.bool)
        if soft.top_p is not None:
            # In integers: a float cumsum on a GPU is not deterministic, and fails where determinism is required.
            mass_RK = log_top_RK.double().exp_().nan_to_num_(0.0).mul_(_ONE).long().cumsum(-1)
            enough = int(soft.top_p * _ONE)
            taken_RK[:, 1:] = mass_RK[:, :-1] < enough
            if tried < most and bool((mass_RK[:, -1] < enough).any()):
                tried = min(8 * tried, most)
                continue
        return torch.zeros_like(log_p_RV, dtype=torch.bool).scatter_(-1, index_RK, taken_RK)
