"""Losses: pure functions, tensors in, sums out."""

from minima.losses.linear_distillation import linear_agreement, linear_cross_entropy, linear_distillation_loss
from minima.losses.loss_sum import LossSum

__all__ = ["LossSum", "linear_agreement", "linear_cross_entropy", "linear_distillation_loss"]
