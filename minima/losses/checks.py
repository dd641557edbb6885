"""Argument checks for the losses: plain numbers, shapes and dtypes, and on a CPU the values of tensors.

On a GPU, looking at values would wait for the device.
"""

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minima.batch import IGNORE_INDEX
from minima.errors import MinimaError


def check_chunk(chunk_tokens: int) -> None:
    """Refuse an invalid chunk size.

    Raises:
        MinimaError: `chunk_tokens` is not a whole number, or is below 1.
    """
    if not is_count(chunk_tokens):
        raise MinimaError(
            f"chunk_tokens {chunk_tokens} is not a valid number of tokens",
            "the loss is summed over chunks of this many tokens, so no token would be counted",
            "give 1 or more; 1024 suits most machines",
        )


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number of at least 1."""
    return is_integer(value) and int(value) >= 1


def check_ranges(what: str, /, **settings: tuple[Any, bool, str]) -> None:
    """Refuse a setting that is out of its range.

    Args:
        what: the name of the loss in the error message.
        settings: for each setting's name, its value, whether it is in range, and the range in words.

    Raises:
        MinimaError: a setting is out of range; the message names the first one.
    """
    for name, (value, right, range_text) in settings.items():
        if not right:
            raise MinimaError(
                f"{what} with {name} {value!r}",
                "the result would not be the loss that was asked for",
                f"give a {name} that is {range_text}",
            )


def is_number(value: Any) -> bool:
    """Whether `value` is a plain real number (not a bool), so that it can be compared."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether `value` is a number between `low` and `high`, both excluded."""
    return is_number(value) and low < value < high


def check_tokens(labels_N: Tensor, ignored: int = IGNORE_INDEX, /, **models: tuple[Tensor, Tensor]) -> None:
    """Refuse hidden states that do not match the labels or their output head.

    Args:
        labels_N: one per token. Their values are checked on a CPU only; on a GPU that would force a sync.
        ignored: the label of tokens that are left out.
        models: hidden states [N, D] and output head [V, D], by the model's name in error messages.

    Raises:
        MinimaError: a shape, dtype, kind of tensor or label is wrong.
    """
    if not is_integer(ignored):
        raise MinimaError(
            f"ignore_index {ignored!r}", "labels are whole numbers, so it would match none", "give a whole number"
        )
    if not isinstance(labels_N, Tensor):
        raise MinimaError(f"labels of {type(labels_N)}", "a label is a token id", "give a tensor of int64 token ids")
    if labels_N.dtype not in (torch.int64, torch.int32):
        raise MinimaError(
            f"labels of {labels_N.dtype}", "a label is a token id", "give int64 token ids: `labels.long()`"
        )
    for name, (hidden_ND, head_VD) in models.items():
        if not (hidden_ND.is_floating_point() and head_VD.is_floating_point()):
            raise MinimaError(
                f"the {name} has hidden states of {hidden_ND.dtype} and an output head of {head_VD.dtype}",
                "logits are products of the two, in floating point",
                "give both in a float dtype; dequantise quantised weights first",
            )
        if hasattr(hidden_ND, "full_tensor") or hasattr(head_VD, "full_tensor"):
            raise MinimaError(
                f"the hidden states or the output head of the {name} are sharded (DTensor)",
                "each chunk of tokens is multiplied by the whole head",
                "call the loss inside the module's forward, where FSDP has gathered the head and reduces its gradient",
            )
        if labels_N.dim() != 1 or hidden_ND.dim() != 2 or len(hidden_ND) != len(labels_N):
            raise MinimaError(
                f"hidden states {list(hidden_ND.shape)} of the {name} for labels {list(labels_N.shape)}",
                "each token has one row of hidden states and one label",
                "give [tokens, width] and [tokens], with batch and sequence flattened into tokens",
            )
        if head_VD.dim() != 2 or head_VD.shape[1] != hidden_ND.shape[1]:
            raise MinimaError(
                f"an output head {list(head_VD.shape)} for hidden states {list(hidden_ND.shape)} of the {name}",
                "logits are products of the two, so their widths must be equal",
                "give the output head [vocabulary, width] of the model that the hidden states come from",
            )
    if labels_N.device.type == "cpu" and type(labels_N) is Tensor:
        _check_vocabulary(labels_N.numpy(), ignored, next(iter(models.values()))[1].shape[0])


def _check_vocabulary(labels_N: np.ndarray, ignored: int, vocabulary: int) -> None:
    kept = labels_N[labels_N != ignored]
    if kept.size and not 0 <= kept.min() <= kept.max() < vocabulary:
        raise MinimaError(
            f"labels from {kept.min()} to {kept.max()} for a vocabulary of {vocabulary} tokens",
            "either they come from a tokenizer other than the model's, or they mark ignored tokens with another number",
            f"give ids from 0 to {vocabulary - 1}, and {ignored} for tokens to leave out",
        )


def check_pairs(policy_BS: Tensor, reference_BS: Tensor, lengths_BS: Tensor) -> None:
    """Refuse log-probabilities that do not cover the same documents, or documents that do not form pairs.

    Raises:
        MinimaError: the shapes differ, or are not [sequences, an even number of documents].
    """
    shapes = [list(tensor.shape) for tensor in (policy_BS, reference_BS, lengths_BS)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2] or len(shapes[0]) != 2 or shapes[0][1] % 2:
        raise MinimaError(
            f"log-probabilities {shapes[0]} of the policy, {shapes[1]} of the reference, and lengths {shapes[2]}",
            "documents 2k and 2k + 1 of a sequence are the two answers of one pair, for all three",
            "give [sequences, documents] with an even number of documents",
        )
