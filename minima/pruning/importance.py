"""Importance scores of heads, neurons and hidden dimensions: the published gradient score, and two baselines.

Shapes: L layers, K key-value groups, I neurons, D width, B batch, T sequence, N tokens, V vocabulary.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minima.batch import Batch
from minima.errors import DataError, StageError
from minima.losses import linear_cross_entropy
from minima.losses.loss_sum import LossSum
from minima.models.causal_lm import head_weight, hidden_states
from minima.models.families import Part, family_of, layout
from minima.models.shape import ModelShape
from minima.models.tensor_file import save_tensors
from minima.models.weights import WeightSource
from minima.pruning.masks import Masks

ScoreKind = Literal["gradient", "magnitude", "random"]
Result = TypeVar("Result")
Run = Callable[[Callable[[Any, Batch], LossSum], Batch], LossSum]  # run(forward, batch) calls forward(model, batch)


@dataclass(frozen=True)
class Scores:
    """Raw scores (not normalised), on the CPU in float32.

    Attributes:
        kind: how they were computed.
        model: identity of the model that was scored (`models.weights.model_identity`).
        head_LK: one per key-value group.
        neuron_LI: one per neuron.
        hidden_D: one per dimension of the residual stream.
        batches: number of micro-batches they are averaged over; 0 if no data was read.
    """

    kind: ScoreKind
    model: str
    head_LK: Tensor
    neuron_LI: Tensor
    hidden_D: Tensor
    batches: int = 0

    def save(self, path: Path) -> None:
        """Write the scores as safetensors; equal scores give equal bytes."""
        tensors = {"head": self.head_LK, "neuron": self.neuron_LI, "hidden": self.hidden_D}
        facts = json.dumps({"kind": self.kind, "model": self.model, "batches": self.batches})
        # Only one metadata entry: safetensors writes several in an order that changes from call to call.
        save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"scores": facts})

    @classmethod
    def load(cls, path: Path, *, kind: ScoreKind, model: str) -> "Scores":
        """Read saved scores of the same kind and model.

        Raises:
            StageError: the file is missing or damaged, or its scores are of another kind or model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {})["scores"])
                head_LK, neuron_LI, hidden_D = (file.get_tensor(name) for name in ("head", "neuron", "hidden"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StageError(
                f"the scores {path} cannot be read: {error}",
                "the scores decide what is pruned",
                "run the stage that makes them again, or omit `scores:`",
            ) from error
        for what, wanted in (("kind", kind), ("model", model)):
            if found[what] != wanted:
                raise StageError(
                    f"the scores {path} have {what} {found[what]!r}, but {wanted!r} is needed",
                    "scores are valid only for the model and the kind that they were computed for",
                    f"reuse scores with the same {what}, or omit `scores:` to compute them again",
                )
        return cls(kind, model, head_LK, neuron_LI, hidden_D, found["batches"])


def cross_entropy_sum(model: Any, batch: Batch) -> LossSum:
    """Next-token cross-entropy of a micro-batch, summed over valid tokens; runs inside the root module's forward."""
    hidden_BTD = hidden_states(model, batch)
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), head_weight(model), batch.labels_BT.flatten())


def importance(
    run: Run,
    model: nn.Module,
    batches: Iterable[Batch],
    shape: ModelShape,
    *,
    identity: str,
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    device: torch.device | str = "cpu",
) -> Scores:
    """Mean over micro-batches of |dL/dmask| at masks of one, where L is the mean loss over the valid tokens.

    The absolute value is taken once per micro-batch, as published, so the score depends on the micro-batch size: within
    a micro-batch, gradients of opposite signs cancel (Zhang et al., 2023; MiniMA's `express`).

    Args:
        run: calls `forward(model, batch)` while the model's parameters are gathered.
        model: the stock model that `run` runs; the masks are hooked into it meanwhile. No weight needs a gradient.
        batches: this rank's micro-batches; every rank must give equally many. One without valid tokens is not counted.
        shape: of the model.
        identity: of the model, stored with the scores.
        all_reduce_sum: sums a tensor over ranks.
        device: of the masks.

    Returns:
        Scores over all ranks, identical on each.

    Raises:
        DataError: no micro-batch of any rank has a valid token.
    """
    masks = Masks(shape, device)
    sums = [torch.zeros_like(mask, requires_grad=False) for mask in masks.tensors()]
    counted = torch.zeros((), dtype=torch.int64, device=device)
    with masks.attached(model):
        for batch in batches:
            loss = run(cross_entropy_sum, batch)
            (loss.total / loss.count.clamp(min=1)).backward()
            for mask, total in zip(masks.tensors(), sums, strict=True):
                assert mask.grad is not None
                total += mask.grad.abs()
                mask.grad = None
            counted += loss.count > 0
    batches_of_all = int(all_reduce_sum(counted))
    if not batches_of_all:
        raise DataError(
            "the data for importance scores has no valid token",
            "the scores are gradients of the loss, and without tokens there is no loss",
            "give at least one sequence, and data whose blocks hold more than padding",
        )
    head_LK, neuron_LI, hidden_D = (all_reduce_sum(total).cpu() / batches_of_all for total in sums)
    return Scores("gradient", identity, head_LK, neuron_LI, hidden_D, batches_of_all)


def magnitude(source: WeightSource, shape: ModelShape, *, identity: str) -> Scores:
    """L2 norm of all weights that belong to a key-value group, neuron or dimension; holds one tensor at a time."""
    family = family_of(shape.family)
    head_LK = torch.zeros(shape.num_layers, shape.num_key_value_heads, dtype=torch.float64)
    neuron_LI = torch.zeros(shape.num_layers, shape.intermediate_size, dtype=torch.float64)
    hidden_D = torch.zeros(shape.hidden_size, dtype=torch.float64)
    for name in source.names():
        layer, _, axes = family.locate(name)
        if not any(axes):
            continue
        squares = source.read(name).float().square()
        for axis, part in enumerate(axes):
            if part is None:
                continue
            others = [other for other in range(squares.dim()) if other != axis]
            along = squares.sum(others, dtype=torch.float64) if others else squares.double()
            per_unit = along.view(layout(part, shape)).sum((0, 2))
            if part is Part.HIDDEN:
                hidden_D += per_unit
            else:
                assert layer is not None
                (neuron_LI if part is Part.NEURON else head_LK)[layer] += per_unit
    return Scores("magnitude", identity, head_LK.sqrt().float(), neuron_LI.sqrt().float(), hidden_D.sqrt().float())


def random(shape: ModelShape, seed: int, *, identity: str) -> Scores:
    """Uniform scores in [0, 1), determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    head_LK = torch.rand(shape.num_layers, shape.num_key_value_heads, generator=generator)
    neuron_LI = torch.rand(shape.num_layers, shape.intermediate_size, generator=generator)
    return Scores("random", identity, head_LK, neuron_LI, torch.rand(shape.hidden_size, generator=generator))
