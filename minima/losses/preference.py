"""Preference losses from log-probabilities of whole answers: DPO and IPO.

Shapes: B sequences, T tokens, S documents of a sequence (even), P = S / 2 pairs of a sequence. Documents 2k and 2k + 1
are the chosen and the rejected answer of pair k.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minima.losses.checks import check_pairs, check_ranges
from minima.losses.loss_sum import LossSum


def document_sums(values_BT: Tensor, documents_BT: Tensor, num_documents: int) -> Tensor:
    """Sum of the values of each document of each sequence.

    Args:
        values_BT: float32 or int64, differentiable.
        documents_BT: int64, all below `num_documents`.
        num_documents: S of the result; a document without tokens has a sum of 0.

    Returns:
        [B, S] in the dtype of the values. Floats are summed in float64: an answer of a thousand tokens is about a
        thousand nats, and the loss depends on small differences between such sums.
    """
    wide_BT = values_BT.double() if values_BT.is_floating_point() else values_BT
    sums_BS = wide_BT.new_zeros(values_BT.shape[0], num_documents).scatter_add(1, documents_BT, wide_BT)
    return sums_BS.to(values_BT.dtype)


def valid_pairs(lengths_BS: Tensor) -> Tensor:
    """Which pairs have labels in both answers: bool [B, P].

    Args:
        lengths_BS: number of labels of each document.
    """
    return (lengths_BS[:, 0::2] > 0) & (lengths_BS[:, 1::2] > 0)


def preference_loss(
    policy_BS: Tensor,
    reference_BS: Tensor,
    lengths_BS: Tensor,
    *,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
) -> LossSum:
    """The preference loss of a policy, as a sum over valid pairs.

    With h the log-ratio of policy to reference for the chosen answer minus that for the rejected one:
    `sigmoid` is -log sigmoid(beta h) (Rafailov et al., 2023, eq. 7), and with a label smoothing of s
    -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h) (conservative DPO: Mitchell, 2023);
    `ipo` is (h - 1 / (2 beta))^2 (Azar et al., 2023, eq. 17), published with length-normalised log-ratios.

    Args:
        policy_BS: float32 sum of log p(label) over each document, differentiable.
        reference_BS: float32; the same for the frozen reference; no gradient.
        lengths_BS: int64; number of labels of each document. A pair with an empty document is not valid.
        loss: `sigmoid` or `ipo`.
        beta: strength of the pull towards the reference; `ipo`'s tau.
        label_smoothing: probability that a pair is labelled the wrong way round; `sigmoid` only.
        length_normalised: divide each document's log-ratio by its number of labels.

    Returns:
        `total`, `count` of valid pairs, and `parts`, sums over the same pairs. The reward is beta times the log-ratio
        that the loss uses: `accuracy` (pairs whose chosen answer has the higher reward; 0 if the policy equals its
        reference), `margin` (chosen minus rejected reward), `chosen_reward` and `rejected_reward`.

    Raises:
        MinimaError: the loss is unknown, a number is out of range, or the shapes do not match.
    """
    _check(loss, beta, label_smoothing)
    check_pairs(policy_BS, reference_BS, lengths_BS)
    valid_BP = valid_pairs(lengths_BS)
    ratio_BS = policy_BS.float() - reference_BS.detach().float()
    if length_normalised:
        ratio_BS = ratio_BS / lengths_BS.clamp(min=1)
    chosen_BP, rejected_BP = ratio_BS[:, 0::2], ratio_BS[:, 1::2]
    margin_BP = beta * (chosen_BP - rejected_BP)
    if loss == "ipo":
        loss_BP = (chosen_BP - rejected_BP - 1 / (2 * beta)).square()
    else:
        loss_BP = -(1 - label_smoothing) * logsigmoid(margin_BP) - label_smoothing * logsigmoid(-margin_BP)

    def pair_sum(values_BP: Tensor) -> Tensor:
        return values_BP.masked_fill(~valid_BP, 0.0).sum()

    with torch.no_grad():
        parts = {
            "accuracy": pair_sum((margin_BP > 0).float()),
            "margin": pair_sum(margin_BP),
            "chosen_reward": pair_sum(beta * chosen_BP),
            "rejected_reward": pair_sum(beta * rejected_BP),
        }
    return LossSum(pair_sum(loss_BP), valid_BP.sum(), parts)


def _check(loss: str, beta: float, label_smoothing: float) -> None:
    smooth = 0 <= label_smoothing < 0.5 if loss == "sigmoid" else label_smoothing == 0
    check_ranges(
        "a preference loss",
        loss=(loss, loss in ("sigmoid", "ipo"), "`sigmoid` or `ipo`"),
        beta=(beta, 0 < beta < math.inf, "above 0 and finite"),
        label_smoothing=(label_smoothing, smooth, "at least 0 and below 0.5; 0 for `ipo`, which trusts all labels"),
    )
