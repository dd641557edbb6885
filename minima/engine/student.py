"""The trainable model on its ZeRO-3 engine: the one place that knows how DeepSpeed averages and steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_set_local_fp32_param
from torch import Tensor, nn
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.engine import distributed
from minima.engine.layers import prepare_layers
from minima.engine.memory import return_unused
from minima.engine.objectives.objective import Objective
from minima.engine.sharded import build_sharded, read_shard, release, sharded_parameters
from minima.losses import LossSum
from minima.models.causal_lm import head_weight, hidden_states
from minima.models.linear_layers import use_cpu_products
from minima.models.weights import WeightSource
from minima.recipe.training import Training


@dataclass
class StudentView:
    """The student as `Student.measured` yields it: a model that only predicts.

    Attributes:
        config: content of the model's `config.json`.
        device: where it computes.
        head_VE: the output head [V, E], whole on every rank.
        mark: called at each forward pass.
    """

    config: dict[str, Any]
    device: torch.device
    head_VE: Tensor
    root: nn.Module
    mark: Callable[[], None]

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [B, T, E] of `batch`, without gradients."""
        self.mark()
        with torch.no_grad():
            return self.root(hidden_states, batch)


class _StudentRoot(nn.Module):
    """What DeepSpeed wraps: the objective runs inside its forward, where ZeRO-3 gathers backbone and head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[PreTrainedModel, Batch], Any], batch: Batch) -> Any:
        return function(self.model, batch)


class Student:
    """A model in training.

    Args:
        source: starting weights and shape.
        deepspeed_config: from `deepspeed_config.training_config`.
        training: the recipe's settings of this stage.
    """

    def __init__(self, source: WeightSource, deepspeed_config: dict[str, Any], training: Training) -> None:
        self.config = source.config
        self.device = distributed.device()
        self.model = build_sharded(source, deepspeed_config, training.precision)
        assert training.activation_checkpointing != "auto", "the stage replaces `auto` by its memory plan's choice"
        use_cpu_products(self.model)
        prepare_layers(
            self.model,
            activation_checkpointing=training.activation_checkpointing,
            compiled=training.compile,
            kernels=training.kernels,
        )
        root = _StudentRoot(self.model).train()
        # DeepSpeed reduces a layer's gradients once all of them are there, which it infers from its inputs' gradients.
        assert all(parameter.requires_grad for parameter in self.model.parameters()), "a trained model has frozen parts"
        # Matrices decay, norms and biases do not; a shard is flat, so the whole parameter's shape decides.
        matrices = [parameter for _, parameter in sharded_parameters(self.model) if len(parameter.ds_shape) >= 2]
        others = [parameter for _, parameter in sharded_parameters(self.model) if len(parameter.ds_shape) < 2]
        groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            fused=get_accelerator().device_name() in ("cpu", "cuda"),  # also if a GPU's optimiser is on the host
        )
        self.engine = deepspeed.initialize(model=root, optimizer=optimizer, config=deepspeed_config)[0]
        self._root = self.engine.module
        if training.precision != "float32":
            # DeepSpeed made the float32 master weights from rounded ones. A stage that continues from another's float32
            # weights must start from their full precision.
            for name, parameter in sharded_parameters(self.model):
                safe_set_local_fp32_param(parameter, read_shard(parameter, source, name))

    def __call__(self, objective: Objective, batch: Batch) -> LossSum:
        """The objective's loss on one micro-batch of this rank."""
        return self.engine(objective, batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the step's gradient, a sum over ranks and micro-batches.

        DeepSpeed divides by the accumulation steps and averages over ranks. The loss is already divided by the global
        count, so both are undone here, and nowhere else.
        """
        self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Finish one micro-batch's backward pass; after the step's last one, clip and update.

        Returns:
            The global gradient norm before clipping; if it is `inf` or `nan`, no weight has changed. Only the value for
            the step's last micro-batch is meaningful.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        boundary = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if not boundary:
            return 0.0
        if self.engine.optimizer.overflow:
            return float("nan")
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def measured(self, mark: Callable[[], None] = lambda: None) -> Iterator["StudentView"]:
        """The student as a model that only predicts, for held-out losses between two steps.

        Args:
            mark: called at each of its forward passes.
        """
        self._root.eval()
        weight = head_weight(self.model)
        try:
            with deepspeed.zero.GatheredParameters([weight]):
                head_VE = weight.detach().clone()
            yield StudentView(self.config, self.device, head_VE, self._root, mark)
        finally:
            self._root.train()

    def close(self) -> None:
        """Free the engine's memory."""
        self.engine.destroy()
        root, optimizer = self._root, self.engine.optimizer
        del self.engine, self._root, self.model
        release(root, optimizer)
        return_unused()
