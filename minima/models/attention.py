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
    length = documents_BT.shape[1]
    places_T = torch.arange(length, device=documents_BT.device)
    distance_TT = places_T[:, None] - places_T[None, :]
    seen_TT = (distance_TT >= 0) if window is None else (distance_TT >= 0) & (distance_TT < window)
    return (seen_TT & (documents_BT[:, :, None] == documents_BT[:, None, :])).unsqueeze(1)


def attention_mask(config: PretrainedConfig, documents_BT: Tensor) -> Any:
    """What a stock model's `attention_mask` is given to keep documents apart: a mask, or one for each kind of layer.

    Args:
        config: of the model.
        documents_BT: int64; equal numbers in a row are one document.
    """
    window = getattr(config, "sliding_window", None)
    if window is None or window >= documents_BT.shape[1]:
        return document_mask(documents_BT)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    masks = {
        kind: document_mask(documents_BT, window if kind == "sliding_attention" else None) for kind in sorted(kinds)
    }
    return masks if getattr(config, "layer_types", None) else masks["sliding_attention"]
