"""Weights, batches and engines of the rows: minima's own, and plain DeepSpeed engines for the other tools."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from minima.batch import Batch, make_batch
from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config, training_config
from minima.engine.layers import prepare_layers
from minima.engine.sharded import build_sharded
from minima.engine.student import Student
from minima.engine.teacher.host import FrozenHost
from minima.engine.teacher.zero3 import check_nvme
from minima.errors import RecipeError
from minima.models.shape import ModelShape
from minima.models.stock import parameter_shapes
from minima.recipe.distillation import Teacher
from minima.recipe.training import Training
from minima.stages.shipped import shipped_folder

from .losses import Missing
from .profiles import Profile, Row

LEARNING_RATE = 1e-6  # so small that no row's model changes noticeably
_BLOCK = 2**20


class TiledSource:
    """Fast random weights: one block of normal numbers, repeated. Generating all of a 7B model's would take minutes.

    The block is generated on the CPU and repeated on the rank's device, which avoids copies from the host.

    Args:
        shape: of the model.
        seed: of the block.
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.config: dict[str, Any] = shape.to_config()
        self._shapes = parameter_shapes(self.config)
        block = torch.empty(_BLOCK).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
        self._block = block.to(distributed.device())

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        return self.read_flat(name, 0, math.prod(self._shapes[name])).view(self._shapes[name])

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        if len(self._shapes[name]) == 1:
            return torch.ones(stop - start, device=self._block.device)
        first = start % _BLOCK
        copies = -(-(first + stop - start) // _BLOCK)
        return self._block.repeat(copies)[first : first + stop - start]


def make_batches(profile: Profile, row: Row, device: torch.device, step: int, short: bool = False) -> list[Batch]:
    """This rank's micro-batches of one step: the same tokens for every row of the same size.

    Args:
        step: counted from 0.
        short: one short sequence per micro-batch, for when the number of tokens does not matter.
    """
    sequences, tokens = (1, min(128, profile.sequence_tokens)) if short else (row.micro_batch, profile.sequence_tokens)
    generator = torch.Generator().manual_seed(1000 * step + distributed.rank())
    size = (row.micro_batches * sequences, tokens)
    tokens_BT = torch.randint(0, profile.student.vocabulary_size, size, generator=generator)
    return [make_batch(part_BT).to(device) for part_BT in tokens_BT.split(sequences)]


def settings(profile: Profile, row: Row) -> Training:
    """The training settings of a corresponding recipe.

    Raises:
        Missing: liger-kernel is not installed, but the profile's own rows use it.
    """
    # Rows that differ only in the loss use stock models, and compiled layers use no other kernels.
    kernels = "stock" if row.group == "a" or row.what == "minima_compiled" else profile.kernels
    if kernels == "liger" and find_spec("liger_kernel") is None:
        raise Missing("liger-kernel is not installed: pip install liger-kernel")
    return Training.model_validate(
        {
            "batch_sequences": distributed.world_size() * row.micro_batch * row.micro_batches,
            "micro_batch_sequences": row.micro_batch,
            "steps": 1,
            "learning_rate": LEARNING_RATE,
            "precision": row.precision,
            "activation_checkpointing": profile.activation_checkpointing,
            "kernels": kernels,
            "compile": row.what == "minima_compiled",
        }
    )


def minima_student(profile: Profile, row: Row) -> Student:
    """minima's trainable model."""
    training = settings(profile, row)
    path = shipped_folder("ds_configs") / training.deepspeed
    config = training_config(path, training, distributed.world_size(), profile.student)
    return Student(TiledSource(profile.student, seed=1), config, training)


def minima_teacher(profile: Profile, row: Row, nvme_path: Path | None) -> FrozenHost:
    """minima's frozen model, placed as the row says.

    Args:
        nvme_path: this rank's folder for shards on NVMe.

    Raises:
        Missing: shards on NVMe cannot be used here.
    """
    training = settings(profile, row)
    if nvme_path is not None:
        try:
            check_nvme()
        except RecipeError as error:
            raise Missing(str(error)) from error
    config = frozen_config(
        shipped_folder("ds_configs") / Teacher.shipped_json(row.placement, row.offload),
        precision=row.precision,
        micro_batch_sequences=row.micro_batch,
        placement=row.placement,
        offload=row.offload,
        nvme_path=nvme_path,
    )
    return FrozenHost(
        TiledSource(profile.teacher, seed=2),
        config,
        precision=row.precision,
        placement=row.placement,
        windows=row.window > 1,
        documents=False,
        layers=lambda model: prepare_layers(model, compiled=training.compile, kernels=training.kernels),
    )


def peer_config(profile: Profile, row: Row) -> dict[str, Any]:
    """The DeepSpeed configuration of minima's student, including buckets, without minima's deviations from defaults."""
    training = settings(profile, row)
    config = training_config(shipped_folder("ds_configs") / training.deepspeed, training, distributed.world_size())
    # minima's own choices, not defaults: float32 accumulation and communication, and no timers that wait for a device.
    ours = ("data_types", "communication_data_type", "timers")
    return {key: value for key, value in config.items() if key not in ours}


class Root(nn.Module):
    """A module whose forward runs a function, for steps that need more than the stock forward inside the engine."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function, *inputs):
        return function(self.model, *inputs)


def peer_student(profile: Profile, row: Row, *, rooted: bool = False):
    """A trainable ZeRO-3 engine for a stock model, with the same optimiser as minima's student."""
    config = peer_config(profile, row)
    model = build_sharded(TiledSource(profile.student, seed=1), config, row.precision)
    if profile.activation_checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    fused = distributed.device().type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
    )
    return deepspeed.initialize(model=Root(model) if rooted else model, optimizer=optimizer, config=config)[0]


def frozen_model(profile: Profile, row: Row, config: dict[str, Any]):
    """The teacher in ZeRO-3 shards, without an engine yet."""
    model = build_sharded(TiledSource(profile.teacher, seed=2), config, row.precision)
    return model.requires_grad_(False).eval()
