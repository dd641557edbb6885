"""How much each head, neuron and hidden dimension matters: the published gradient score, and two baselines.

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
    """Scores as they were measured, on the CPU in float32, not normalised.

    Attributes:
        kind: how they were made.
        model: identity of the model that was scored (`models.weights.model_identity`).
        head_LK: one for each key-value group.
        neuron_LI: one for each neuron.
        hidden_D: one for each dimension of the residual stream.
        batches: micro-batches that they are a mean over; 0 where no data was read.
    """

    kind: ScoreKind
    model: str
    head_LK: Tensor
    neuron_LI: Tensor
    hidden_D: Tensor
    batches: int = 0

    def save(self, path: Path) -> None:
        """Write them as safetensors; the same scores give the same bytes."""
        tensors = {"head": self.head_LK, "neuron": self.neuron_LI, "hidden": self.hidden_D}
        facts = json.dumps({"kind": self.kind, "model": self.model, "batches": self.batches})
        # One entry only: safetensors writes several in an order that changes from call to call.
        save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"scores": facts})

    @classmethod
    def load(cls, path: Path, *, kind: ScoreKind, model: str) -> "Scores":
        """Read saved scores of the same kind and model.

        Raises:
            StageError: no such file, a damaged one, or scores of another kind or of another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {})["scores"])
                head_LK, neuron_LI, hidden_D = (file.get_tensor(name) for name in ("head", "neuron", "hidden"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StageError(
                f"the scores {path} cannot be read: {error}",
                "without scores there is no telling what to cut",
                "run the stage that makes them again, or leave `scores:` out",
            ) from error
        for what, wanted in (("kind", kind), ("model", model)):
            if found[what] != wanted:
                raise StageError(
                    f"the scores {path} are of {what} {found[what]!r}, wanted is {wanted!r}",
                    "scores only say something about the model, and in the way, that they were measured",
                    f"reuse scores of the same {what}, or leave `scores:` out to measure anew",
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
    """Mean over micro-batches of |dL/dmask| at masks of one, L the mean loss over a micro-batch's valid tokens.

    The absolute value is taken once per micro-batch, as published, so the score depends on the micro-batch's size:
    inside it, gradients of opposite signs cancel (Zhang et al., 2023; MiniMA's `express`).

    Args:
        run: calls `forward(model, batch)` where the model's parameters are whole.
        model: the stock model that `run` runs; the masks are hooked into it meanwhile. No weight needs a gradient.
        batches: this rank's micro-batches; every rank has to give as many. One without valid tokens counts as none.
        shape: of the model.
        identity: of the model, kept with the scores.
        all_reduce_sum: gives the sum of a tensor over ranks.
        device: of the masks.

    Returns:
        Scores of all ranks together, the same on each.

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
            "importance was to be measured on no valid token",
            "the gradient of no loss is no score",
            "give data whose blocks hold more than padding, and at least one sequence",
        )
    head_LK, neuron_LI, hidden_D = (all_reduce_sum(total).cpu() / batches_of_all for total in sums)
    return Scores("gradient", identity, head_LK, neuron_LI, hidden_D, batches_of_all)


def magnitude(source: WeightSource, shape: ModelShape, *, identity: str) -> Scores:
    """L2 norm of all weights that would go with a head group, neuron or dimension; one tensor in memory at a time."""
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
    """Uniform scores in [0, 1) that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    head_LK = torch.rand(shape.num_layers, shape.num_key_value_heads, generator=generator)
    neuron_LI = torch.rand(shape.num_layers, shape.intermediate_size, generator=generator)
    return Scores("random", identity, head_LK, neuron_LI, torch.rand(shape.hidden_size, generator=generator))
