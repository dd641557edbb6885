"""The teacher window: one traversal of a frozen model's layers for several micro-batches.

A model without gradients keeps nothing of a layer but its output. So each layer's weights, once gathered from the other
ranks or fetched from the host, can serve all micro-batches of a window before they are released, which divides the
traffic by the window's size. A layer's activations still take the memory of one micro-batch.

Shapes: R sequences of all micro-batches, B sequences of one, T tokens, E width.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.models.attention import attention_mask
from minima.models.causal_lm import backbone, final_norm
from minima.models.compiling import decoder_layers


class LayerWindow:
    """Runs each layer of one model instance for one micro-batch after another, within one call of the model.

    Args:
        model: its layers' `forward` is wrapped, in this instance only. DeepSpeed's hooks stay outside the wrapper.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._rows: list[slice] = []
        self._masks: list[Any] | None = None
        self._kinds: dict[str, Tensor] = {}
        for module in (*decoder_layers(model), final_norm(model)):  # the norm computes in float32: 8 bytes per number
            module.forward = self._by_micro_batch(module.forward)

    def hidden_states(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
        """Final hidden states of all micro-batches, concatenated, [R, T, E]; each as if it had run alone.

        Args:
            model: the one that this was made for.
            batches: sequences of equal length; some may have documents and others none.
        """
        rows, start = [], 0
        for batch in batches:
            rows.append(slice(start, start + len(batch.input_ids_BT)))
            start = rows[-1].stop
        given: dict[str, Any] = {"input_ids": torch.cat([batch.input_ids_BT for batch in batches])}
        masks: list[Any] | None = None
        if any(batch.documents_BT is not None for batch in batches):
            given["position_ids"] = torch.cat([_positions(batch) for batch in batches])
            masks = [_mask(model, batch) for batch in batches]
            kinds = next((sorted(mask) for mask in masks if isinstance(mask, dict)), None)
            # Each layer gets its micro-batch's mask through our wrapper. The model itself only passes on a placeholder
            # of each kind: given a four-dimensional mask, it builds none.
            if kinds is not None:
                self._kinds = {kind: _placeholder() for kind in kinds}
                given["attention_mask"] = self._kinds
            elif None not in masks:
                given["attention_mask"] = _placeholder()
        self._rows, self._masks = rows, masks
        try:
            return backbone(model)(**given, use_cache=False).last_hidden_state
        finally:
            self._rows, self._masks, self._kinds = [], None, {}

    def _by_micro_batch(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(forward)
        takes_mask = "attention_mask" in signature.parameters
        first = next(iter(signature.parameters))

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._rows:
                return forward(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            hidden_RTE, output = bound.arguments[first], None
            for number, rows in enumerate(self._rows):
                part = {name: _part(value, rows, len(hidden_RTE)) for name, value in bound.arguments.items()}
                if takes_mask and self._masks is not None:
                    part["attention_mask"] = self._mask_of(number, bound.arguments.get("attention_mask"))
                output = forward(**part.pop("kwargs", {}), **part)
                # A layer's input is no longer needed once its micro-batch has run, so the output takes its place.
                hidden_RTE[rows].copy_(output[0] if isinstance(output, tuple) else output)
            return (hidden_RTE, *output[1:]) if isinstance(output, tuple) else hidden_RTE

        return run

    def _mask_of(self, number: int, given: Any) -> Any:
        assert self._masks is not None
        mask = self._masks[number]
        if not isinstance(mask, dict):
            return mask
        return mask[next(kind for kind, placeholder in self._kinds.items() if placeholder is given)]


def _part(value: Any, rows: slice, total: int) -> Any:
    """The rows of a layer's argument that belong to one micro-batch; what all sequences share is left as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == total else value
    if isinstance(value, tuple | list):
        return type(value)(_part(inner, rows, total) for inner in value)
    if isinstance(value, dict):
        return {name: _part(inner, rows, total) for name, inner in value.items()}
    return value


def _mask(model: PreTrainedModel, batch: Batch) -> Any:
    """A micro-batch's mask; None if it has no documents and no layer has a sliding window."""
    if batch.documents_BT is None and getattr(model.config, "sliding_window", None) is None:
        return None
    return attention_mask(model.config, _documents(batch), model.dtype)


def _placeholder() -> Tensor:
    return torch.empty(1, 1, 1, 1)


def _positions(batch: Batch) -> Tensor:
    if batch.positions_BT is not None:
        return batch.positions_BT
    ids_BT = batch.input_ids_BT
    return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)


def _documents(batch: Batch) -> Tensor:
    return torch.zeros_like(batch.input_ids_BT) if batch.documents_BT is None else batch.documents_BT
