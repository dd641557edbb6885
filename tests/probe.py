"""A loss to compare gradients by."""

import torch
from torch import Tensor


def probe_loss(hidden: Tensor) -> Tensor:
    """A weighted sum of a model's final hidden states in float32; weights and so gradients are the same on any device.

    The mean of their squares would be none: they come from a norm, which makes it one whatever the weights are, and its
    gradients rounding noise.
    """
    numbers = torch.arange(hidden.numel(), device=hidden.device).view(hidden.shape)
    weights = (numbers * 7919 % 1009).float() / 504 - 1  # from -1 to 1, in no order that a layer could follow
    return (hidden.float() * weights).sum() / hidden.numel() ** 0.5
