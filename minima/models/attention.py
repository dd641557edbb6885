"""Causal attention that asks nothing of the host, with or without walls between the documents of a packed block.

Shapes: B sequences, T tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The stock `sdpa` looks, in every forward pass, whether position ids describe a packed batch, and reads the answer on
# the host: on a GPU each micro-batch would wait for it twice, for teacher and student. Under a name of its own, for
# which no mask is made, the same kernel runs with `is_causal`, to the same bits; a four-dimensional mask that is given
# is taken as it is. A new entry; no stock one is changed.
CAUSAL = "minima_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attention_implementation(config: PretrainedConfig) -> str:
    """The attention of a stock model: plain causal, or `sdpa` where a sliding window needs a mask."""
    return CAUSAL if getattr(config, "sliding_window", None) is None else "sdpa"


def document_mask(documents_BT: Tensor, window: int | None = None) -> Tensor:
    """Which token may see which: bool [B, 1, T, T], True where the column is no later and of the row's document.

    Every token sees itself, so no row is empty.

    Args:
        documents_BT: int64; equal numbers in a row are one document.
        window: see only the last so many tokens, oneself included; all when not given.
    """
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    seen_TT = places_T[:, None] >= places_T[None, :]
    if window is not None:
        seen_TT &= places_T[:, None] < places_T[None, :] + window
    mask_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    mask_BTT &= seen_TT
    return mask_BTT.unsqueeze(1)


def attention_mask(config: PretrainedConfig, documents_BT: Tensor, dtype: torch.dtype) -> Any:
    """What a stock model's `attention_mask` is given to keep documents apart: a bias, or one for each kind of layer.

    A bias of 0 and minus infinity, made once for all layers: of a bool mask, attention would make one in every layer
    and keep each for the backward pass.

    Args:
        config: of the model.
        documents_BT: int64; equal numbers in a row are one document.
        dtype: of the model's activations.

    Returns:
        [B, 1, T, T] in `dtype`, or such by the names of `layer_types`.
    """

    def bias(window: int | None) -> Tensor:
        mask_B1TT = document_mask(documents_BT, window)
        return torch.zeros(mask_B1TT.shape, dtype=dtype, device=mask_B1TT.device).masked_fill_(~mask_B1TT, -torch.inf)

    window = getattr(config, "sliding_window", None)
    if window is None or window >= documents_BT.shape[1]:
        return bias(None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return bias(window)
    return {kind: bias(window if kind == "sliding_attention" else None) for kind in sorted(set(kinds))}
