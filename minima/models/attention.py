"""Causal attention without host synchronisation, optionally masked between the documents of a packed block.

Shapes: B sequences, T tokens, H query heads, K key-value heads, A head size, N blocks of tokens.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minima.models.compiling import compiled_whole
from minima.triton_driver import triton_trouble

_BLOCK = 128  # flex attention's default: a block of this many rows and columns is computed or skipped as a whole
_SMALLEST_HEAD = 16  # flex attention's kernels refuse smaller ones


def attention(
    module: nn.Module,
    query_BHTA: Tensor,
    key_BKTA: Tensor,
    value_BKTA: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The stock `sdpa`, or flex attention if the mask is a `BlockMask`; [B, T, H, A], as stock layers expect."""
    if not isinstance(attention_mask, BlockMask):
        if attention_mask is None and _holds_all_scores(query_BHTA, key_BKTA):
            groups = query_BHTA.shape[1] // key_BKTA.shape[1]
            key_BKTA, value_BKTA = repeat_kv(key_BKTA, groups), repeat_kv(value_BKTA, groups)
        return sdpa_attention_forward(module, query_BHTA, key_BKTA, value_BKTA, attention_mask, **kwargs)
    assert not kwargs.get("dropout"), "dropout is always 0"
    # Inside a compiled layer, flex attention becomes part of the layer's graph.
    attend: Any = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    output_BHTA = attend(
        query_BHTA,
        key_BKTA,
        value_BKTA,
        block_mask=attention_mask,
        scale=kwargs.get("scaling"),
        enable_gqa=query_BHTA.shape[1] != key_BKTA.shape[1],
    )
    return output_BHTA.transpose(1, 2).contiguous(), None


def _holds_all_scores(query_BHTA: Tensor, key_BKTA: Tensor) -> bool:
    """Whether stock `sdpa`, called without a mask, would materialise the [B, H, T, T] scores.

    It passes grouped keys and values on without repeating them. For float32 on a GPU the only kernel that does not
    materialise the scores is the memory-efficient one, which up to PyTorch 2.13 does not support grouped heads. Above a
    head size of 256 stock `sdpa` repeats them itself.
    """
    return query_BHTA.device.type == "cuda" and query_BHTA.dtype == torch.float32 and key_BKTA.shape[-1] <= 256


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled flex attention for layers that are not compiled; uncompiled it would hold all scores of all heads."""
    options = {}
    if hasattr(importlib.import_module("torch._inductor.config"), "wrap_inductor_compiled_regions"):
        options["wrap_inductor_compiled_regions"] = True  # so that selective recomputation sees it and keeps its output
    return compiled_whole(flex_attention, options=options)


# Stock `sdpa` inspects position_ids on the host in every forward pass to detect packed batches: on a GPU each
# micro-batch would synchronise twice, for teacher and student. Under a name of our own no mask is built: the same
# kernel runs with `is_causal`, bit-identically; an explicit mask is passed on. We add entries and change no stock one.
CAUSAL = "minima_causal"
AttentionInterface.register(CAUSAL, attention)
# A sliding window needs a mask, so the stock one is built if none is given.
WINDOWED = "minima_windowed"
AttentionInterface.register(WINDOWED, attention)
AttentionMaskInterface.register(WINDOWED, sdpa_mask)


def attention_implementation(config: PretrainedConfig) -> str:
    """The attention implementation for a stock model: plain causal, or with a mask if it has a sliding window."""
    return CAUSAL if getattr(config, "sliding_window", None) is None else WINDOWED


def document_mask(documents_BT: Tensor, window: int | None = None) -> Tensor:
    """Which token may see which: bool [B, 1, T, T], True if the column is not later and in the row's document.

    Every token sees itself, so no row is empty.

    Args:
        documents_BT: int64; equal numbers in a row are one document.
        window: number of most recent tokens that a token sees, itself included; all if not given.
    """
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    seen_TT = places_T[:, None] >= places_T[None, :]
    if window is not None:
        seen_TT &= places_T[:, None] < places_T[None, :] + window
    mask_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    mask_BTT &= seen_TT
    return mask_BTT.unsqueeze(1)


def document_blocks(documents_BT: Tensor, window: int | None = None) -> BlockMask:
    """The mask of `document_mask` for flex attention: which of its blocks are empty, full or partial.

    Derived from the smallest and largest document number of each block of tokens, so that no [T, T] tensor is built and
    the host is not needed. If document numbers are not in order, more blocks than necessary count as partial.
    """
    num_tokens = documents_BT.shape[1]
    num_blocks = -(-num_tokens // _BLOCK)
    last_B1 = documents_BT[:, -1:]  # pads the last block; no real token sees the padding, which comes later
    filled_BT = torch.cat([documents_BT, last_B1.expand(-1, num_blocks * _BLOCK - num_tokens)], dim=1)
    low_BN, high_BN = filled_BT.view(len(documents_BT), num_blocks, _BLOCK).aminmax(dim=2)
    numbers_N = torch.arange(num_blocks, device=documents_BT.device)
    apart_NN = (numbers_N[:, None] - numbers_N[None, :]) * _BLOCK  # tokens from a column block's start to a row block's
    some_BNN = (low_BN[:, :, None] <= high_BN[:, None, :]) & (high_BN[:, :, None] >= low_BN[:, None, :])
    some_BNN &= apart_NN >= 0
    full_BNN = (low_BN[:, :, None] == high_BN[:, None, :]) & (high_BN[:, :, None] == low_BN[:, None, :])
    full_BNN &= apart_NN > 0
    if window is not None:
        some_BNN &= apart_NN - (_BLOCK - 1) < window
        full_BNN &= apart_NN + (_BLOCK - 1) < window

    def seen(row: Tensor, _head: Tensor, place: Tensor, other: Tensor) -> Tensor:
        visible = (place >= other) & (documents_BT[row, place] == documents_BT[row, other])
        return visible if window is None else visible & (place - other < window)

    return BlockMask.from_kv_blocks(
        *_block_lists(some_BNN & ~full_BNN),
        *_block_lists(some_BNN & full_BNN),
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen,
        seq_lengths=(num_tokens, num_tokens),
    )


def _block_lists(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """The number of True blocks in each row [B, 1, N], and the column numbers, True ones first [B, 1, N, N]."""
    counts_BN = blocks_BNN.sum(dim=-1, dtype=torch.int32)
    columns_BNN = blocks_BNN.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts_BN.unsqueeze(1), columns_BNN.unsqueeze(1)


def attention_mask(config: PretrainedConfig, documents_BT: Tensor, dtype: torch.dtype) -> Any:
    """The `attention_mask` argument for a stock model that keeps documents apart, or one per kind of layer.

    On a GPU where Triton runs, it is a block mask for flex attention, built once for all layers. It belongs to these
    sequences: unlike a tensor it cannot be sliced along the batch. Elsewhere it is a bias of 0 and minus infinity: from
    a bool mask, attention would make a bias in every layer and keep each for the backward pass.

    Args:
        config: of the model.
        documents_BT: int64; equal numbers in a row are one document.
        dtype: of the model's activations.

    Returns:
        A `BlockMask`, or [B, 1, T, T] in `dtype`; or a dict of these by the names in `layer_types`.
    """

    def made(window: int | None) -> Tensor | BlockMask:
        on_gpu = documents_BT.device.type == "cuda"
        if on_gpu and _takes_blocks(config, documents_BT.shape[1]) and triton_trouble() is None:
            return document_blocks(documents_BT, window)
        mask_B1TT = document_mask(documents_BT, window)
        return torch.zeros(mask_B1TT.shape, dtype=dtype, device=mask_B1TT.device).masked_fill_(~mask_B1TT, -torch.inf)

    window = getattr(config, "sliding_window", None)
    if window is None or window >= documents_BT.shape[1]:
        return made(None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return made(window)
    return {kind: made(window if kind == "sliding_attention" else None) for kind in sorted(set(kinds))}


def _takes_blocks(config: PretrainedConfig, length: int) -> bool:
    """Whether the model and the sequence length suit a block mask.

    For sequences shorter than a block PyTorch chooses a kernel that may have no configuration for grouped queries.
    """
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The stock GPT-2 reads `mask.ndim`, which a block mask does not have.
    return length >= _BLOCK and head_size >= _SMALLEST_HEAD and config.model_type != "gpt2"
