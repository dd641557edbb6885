"""What a caller of the losses may get wrong. On a GPU shapes and plain numbers alone are looked at: nothing waits."""

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minima.batch import IGNORE_INDEX
from minima.errors import MinimaError


def check_chunk(chunk_tokens: int) -> None:
    """Refuse chunks of no tokens.

    Raises:
        MinimaError: `chunk_tokens` is no whole number, or below 1.
    """
    if not is_count(chunk_tokens):
        raise MinimaError(
            f"chunk_tokens {chunk_tokens} is no number of tokens",
            "a loss is added up over chunks of so many tokens, so it would be of none",
            "give 1 or more; 1024 suits most machines",
        )


def is_integer(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 1 on."""
    return is_integer(value) and int(value) >= 1


def check_ranges(what: str, /, **settings: tuple[Any, bool, str]) -> None:
    """Refuse a setting that is out of its range.

    Args:
        what: the loss, as a message calls it.
        settings: value, whether it is in range, and the range, by the setting's name.

    Raises:
        MinimaError: names the first that is not.
    """
    for name, (value, right, range_text) in settings.items():
        if not right:
            raise MinimaError(
                f"{what} with {name} {value!r}",
                "the value returned would not be the loss that was asked for",
                f"give a {name} that is {range_text}",
            )


def is_number(value: Any) -> bool:
    """Whether it is a plain real number, which can be compared."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether it is a number between the two, both excluded."""
    return is_number(value) and low < value < high


def check_tokens(labels_N: Tensor, ignored: int = IGNORE_INDEX, /, **models: tuple[Tensor, Tensor]) -> None:
    """Refuse hidden states that do not belong to the labels, or not to their head.

    Args:
        labels_N: one for each token. On a CPU they are looked at; a GPU would have to be waited for.
        ignored: the label of tokens that are left out.
        models: hidden states [N, D] and output head [V, D], by what to call the model.

    Raises:
        MinimaError: a shape or a kind of tensor is another.
    """
    if not is_integer(ignored):
        raise MinimaError(
            f"ignore_index {ignored!r}", "labels are whole numbers, so none would be left out", "give a whole number"
        )
    if not isinstance(labels_N, Tensor):
        raise MinimaError(
            f"labels of {type(labels_N)}", "a label is the number of a token", "give a tensor of int64 token ids"
        )
    if labels_N.dtype not in (torch.int64, torch.int32):
        raise MinimaError(
            f"labels of {labels_N.dtype}", "a label is the number of a token", "give int64 token ids: `labels.long()`"
        )
    for name, (hidden_ND, head_VD) in models.items():
        if not (hidden_ND.is_floating_point() and head_VD.is_floating_point()):
            raise MinimaError(
                f"hidden states of {hidden_ND.dtype} and an output head of {head_VD.dtype} of the {name}",
                "logits are products of the two, in floating point",
                "give both in a float dtype; quantised weights have to be turned back first",
            )
        if hasattr(hidden_ND, "full_tensor") or hasattr(head_VD, "full_tensor"):
            raise MinimaError(
                f"hidden states or an output head of the {name} that are sharded (DTensor)",
                "each chunk of tokens is multiplied with the whole head",
                "call the loss inside the module's forward, where FSDP has gathered it and adds up its gradient",
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
                "logits are products of the two, so they have to be of one width",
                "give the output head [vocabulary, width] of the model that the hidden states come from",
            )
    if labels_N.device.type == "cpu" and type(labels_N) is Tensor:
        _check_vocabulary(labels_N.numpy(), ignored, next(iter(models.values()))[1].shape[0])


def _check_vocabulary(labels_N: np.ndarray, ignored: int, vocabulary: int) -> None:
    kept = labels_N[labels_N != ignored]
    if kept.size and not 0 <= kept.min() <= kept.max() < vocabulary:
        raise MinimaError(
            f"labels from {kept.min()} to {kept.max()} for a vocabulary of {vocabulary} tokens",
            "they are token ids of another tokenizer than the model's, or meant to be left out by another number",
            f"give ids from 0 to {vocabulary - 1}, and {ignored} where a token is left out",
        )


def check_pairs(policy_BS: Tensor, reference_BS: Tensor, lengths_BS: Tensor) -> None:
    """Refuse log-probabilities that are not of the same documents, or whose documents are not pairs.

    Raises:
        MinimaError: a shape is another.
    """
    shapes = [list(tensor.shape) for tensor in (policy_BS, reference_BS, lengths_BS)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2] or len(shapes[0]) != 2 or shapes[0][1] % 2:
        raise MinimaError(
            f"log-probabilities {shapes[0]} of the policy, {shapes[1]} of the reference, and lengths {shapes[2]}",
            "documents 2k and 2k + 1 of a sequence are the two answers of one pair, for all three",
            "give [sequences, documents] with an even number of documents",
        )
