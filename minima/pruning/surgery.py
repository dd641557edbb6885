"""The dense weights of a pruned model, as a weight source that slices another source one tensor at a time.

Shapes: D width of the model, D' width of the student.
"""

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor

from minima.models.families import Part, family_of, layout
from minima.models.weights import WeightSource
from minima.pruning.selection import Selection
from minima.pruning.target import check_depth, check_norm_compensation

PAD = -1  # in a list of units: stands for a unit of zeros


class PrunedSource:
    """A `WeightSource` of the pruned model: stock names, renumbered layers, every tensor sliced as it is read.

    With `norm_compensation` `rms` the student computes exactly what the model computes if the removed dimensions are
    zero: the mean square over all D dimensions is then D'/D of that over the kept ones, so
    `w x / sqrt(D'/D mean_square + eps) = sqrt(D/D') w x / sqrt(mean_square + eps D/D')`. A norm over head dimensions
    (Qwen3) keeps its weight. It shares the larger epsilon, which is balanced by scaling query and key weights by
    sqrt(D/D'), a factor that this norm removes again.

    Args:
        source: the model to prune.
        selection: what to keep.
        norm_compensation: `none` leaves norm weights and epsilon unchanged, as published.

    Raises:
        ShapeError: `rms` for a family with LayerNorms, or dropped layers where the model does not allow it.
    """

    def __init__(
        self,
        source: WeightSource,
        selection: Selection,
        norm_compensation: Literal["none", "rms"] = "none",
    ) -> None:
        check_norm_compensation(selection.source, norm_compensation)
        check_depth(source.config, selection.student.num_layers)
        self._source, self._selection = source, selection
        self._family = family_of(selection.source.family)
        self._stretch = selection.source.hidden_size / selection.student.hidden_size  # D/D'
        self._compensated = norm_compensation == "rms"
        self.config: dict[str, Any] = self._student_config()
        self._new_layer = {old: new for new, old in enumerate(selection.layers.tolist())}
        self._origin: dict[str, str] = {}
        for name in source.names():
            layer, inside, _ = self._family.locate(name)
            if layer is None:
                self._origin[name] = name
            elif layer in self._new_layer:
                self._origin[f"{self._family.layers}.{self._new_layer[layer]}.{inside}"] = name

    def names(self) -> list[str]:
        return list(self._origin)

    def shape(self, name: str) -> tuple[int, ...]:
        rows = self._rows(self._origin[name])
        return tuple(
            size if kept is None else len(kept)
            for size, kept in zip(self._source.shape(self._origin[name]), rows, strict=True)
        )

    def read(self, name: str) -> Tensor:
        origin = self._origin[name]
        tensor = self._source.read(origin)
        for axis, kept in enumerate(self._rows(origin)):
            if kept is None:
                continue
            tensor = tensor.index_select(axis, kept.clamp(min=0))
            if bool((kept == PAD).any()):
                tensor = tensor.index_fill(axis, (kept == PAD).nonzero().flatten(), 0)
        return self._compensate(origin, tensor) if self._compensated else tensor

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).reshape(-1)[start:stop]

    @property
    def parameters(self) -> int:
        """Number of parameters of the student, zero padding included."""
        return sum(math.prod(self.shape(name)) for name in self.names())

    @property
    def parameters_without_padding(self) -> int:
        """Number of the student's parameters that come from the model."""
        total = 0
        for name, origin in self._origin.items():
            rows = self._rows(origin)
            kept = (int((row != PAD).sum()) for row in rows if row is not None)
            whole = (size for size, row in zip(self.shape(name), rows, strict=True) if row is None)
            total += math.prod(kept) * math.prod(whole)
        return total

    def _rows(self, origin: str) -> list[Tensor | None]:
        """For each axis of a model's tensor, the indices to keep, with `PAD` for zeros; None keeps all."""
        layer, _, axes = self._family.locate(origin)
        rows: list[Tensor | None] = []
        for part in axes:
            if part is None:
                rows.append(None)
                continue
            outer, units, inner = layout(part, self._selection.source)
            kept = self._units(part, layer)
            table = torch.arange(outer * units * inner).view(outer, units, inner)
            chosen = table.index_select(1, kept.clamp(min=0))
            chosen.index_fill_(1, (kept == PAD).nonzero().flatten(), PAD)
            rows.append(chosen.flatten())
        return rows

    def _units(self, part: Part, layer: int | None) -> Tensor:
        chosen = self._selection
        if part is Part.HIDDEN:
            return chosen.hidden
        assert layer is not None
        number = self._new_layer[layer]
        if part is Part.NEURON:
            kept, width = chosen.neurons[number], chosen.student.intermediate_size
        else:
            kept, width = chosen.groups[number], chosen.student.num_key_value_heads
        return torch.cat([kept, kept.new_full((width - len(kept),), PAD)])

    def _compensate(self, origin: str, tensor: Tensor) -> Tensor:
        _, inside, _axes = self._family.locate(origin)
        norms = (f"{self._family.final_norm}.weight", *(f"{norm}.weight" for norm in self._family.norms))
        normed_later = self._family.query_key_norms and inside.startswith(("self_attn.q_proj", "self_attn.k_proj"))
        if inside in norms or normed_later:
            return (tensor.float() * math.sqrt(self._stretch)).to(tensor.dtype)
        return tensor

    def _student_config(self) -> dict[str, Any]:
        config = copy.deepcopy(self._source.config)
        student, names = self._selection.student, self._family.config_names
        for field in ("num_layers", "hidden_size", "num_heads", "num_key_value_heads", "intermediate_size"):
            if field in names:
                config[names[field]] = getattr(student, field)
        derived = student.hidden_size // student.num_heads
        if "head_size" in names and (self._family.name != "qwen2" or student.head_size != derived):
            config[names["head_size"]] = student.head_size  # not a field of Qwen2, but its attention reads it if set
        if self._compensated:
            config[names["norm_epsilon"]] = self._selection.source.norm_epsilon * self._stretch
        kinds = _layer_types(self._source.config, self._selection.source.num_layers)
        if kinds is not None:
            config["layer_types"] = [kinds[layer] for layer in self._selection.layers.tolist()]
        return config


def _layer_types(config: dict[str, Any], num_layers: int) -> list[str] | None:
    """The attention kind of each layer in models with sliding windows (Qwen2 and Qwen3), listed or derived; or None."""
    if config.get("layer_types") is not None:
        return config["layer_types"]
    if not config.get("use_sliding_window"):
        return None
    first = config.get("max_window_layers", 28)  # Qwen2Config's default
    return ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
