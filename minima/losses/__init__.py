"""Losses: pure functions, tensors in, sums out."""

from minima.losses.agreement import linear_agreement
from minima.losses.divergences import DivergenceName
from minima.losses.linear_distillation import linear_cross_entropy, linear_distillation_loss
from minima.losses.loss_sum import LossSum
from minima.losses.preference import document_sums, preference_loss, valid_pairs
from minima.losses.token_log_probs import linear_token_log_probs

__all__ = [
    "DivergenceName",
    "LossSum",
    "document_sums",
    "linear_agreement",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_token_log_probs",
    "preference_loss",
    "valid_pairs",
]
