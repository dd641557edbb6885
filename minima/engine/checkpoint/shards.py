"""Move a student's state out of its engine and back, as plain tensors: weights, Adam's moments and random states.

Every file holds flat shards without padding, so that any number of ranks can read what any other number wrote.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from torch import Tensor

from minima.engine import distributed
from minima.engine.checkpoint.store import read_marker, verify_together
from minima.engine.sharded import read_shard, shard_range, sharded_parameters
from minima.engine.student import Student
from minima.errors import CheckpointError
from minima.models.tensor_file import save_tensors
from minima.models.weights import ShapedSource

WEIGHTS, FIRST_MOMENTS, SECOND_MOMENTS = "weights", "exp_avg", "exp_avg_sq"


class CheckpointSource(ShapedSource):
    """Master weights (float32), or another kind of per-parameter state, of a complete checkpoint.

    A `WeightSource`, so that a checkpoint starts another stage, is evaluated and is exported like any folder.

    Args:
        checkpoint: its folder.
        kind: `weights`, or Adam's `exp_avg` or `exp_avg_sq`.

    Raises:
        CheckpointError: there is no complete checkpoint there.
    """

    def __init__(self, checkpoint: Path, kind: str = WEIGHTS, facts: dict[str, Any] | None = None) -> None:
        self.facts = read_marker(checkpoint) if facts is None else facts
        self.config: dict[str, Any] = self.facts["config"]
        self.folder, self.kind = checkpoint, kind
        self._shapes = {name: tuple(shape) for name, shape in self.facts["shapes"].items()}
        self._ranks: int = self.facts["ranks"]

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self.read_flat(name, 0, int(np.prod(shape))).view(shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        size = -(-int(np.prod(self._shapes[name])) // self._ranks)  # ZeRO-3 pads every shard to this
        pieces = []
        for rank in range(start // size, -(-stop // size)):
            with safe_open(self.folder / file_name(self.kind, rank, self._ranks), framework="pt") as file:
                shard = file.get_slice(name)
                pieces.append(shard[max(0, start - rank * size) : min(size, stop - rank * size)])
        if not pieces:
            return torch.empty(0)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def file_name(kind: str, rank: int, ranks: int) -> str:
    """The name of one rank's file of one kind of state."""
    return f"{kind}-{rank:05d}-of-{ranks:05d}.safetensors"


def shapes(student: Student) -> dict[str, list[int]]:
    """The name and full shape of every parameter."""
    return {name: list(parameter.ds_shape) for name, parameter in sharded_parameters(student.model)}


def snapshot_shards(student: Student) -> Callable[[Path], list[Path]]:
    """Copy this rank's state to host memory, and return a function that writes the copy into a folder.

    The copy takes 12 bytes per parameter of this rank's shard. The function may run in another thread while the student
    trains on; it returns the files that it wrote.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    kinds: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, FIRST_MOMENTS: {}, SECOND_MOMENTS: {}}
    for name, parameter in sharded_parameters(student.model):
        start, stop = shard_range(parameter)
        for kind, shards in kinds.items():
            if kind == WEIGHTS:
                shard = safe_get_local_fp32_param(parameter)
            else:
                shard = safe_get_local_optimizer_state(parameter, kind)
            shards[name] = shard.detach().view(-1)[: stop - start].to("cpu", copy=True)
    random_states = json.dumps(_random_states())

    def write(folder: Path) -> list[Path]:
        files = []
        for kind, shards in kinds.items():
            files.append(folder / file_name(kind, rank, ranks))
            save_tensors(shards, files[-1])
        files.append(folder / f"random-{rank:05d}-of-{ranks:05d}.json")
        files[-1].write_text(random_states, encoding="utf-8")
        return files

    return write


def load_shards(student: Student, checkpoint: Path) -> dict[str, Any]:
    """Put a checkpoint's state into a student that has just been built; any number of ranks may have written it.

    Returns:
        The content of the checkpoint's marker.

    Raises:
        CheckpointError: it holds a model of another shape.
        StoreCorrupted: a file is missing or damaged; on every rank, before anything in the student has changed.
    """
    facts = verify_together(checkpoint)  # read once: a rank that failed to read it later would fail alone
    if facts["shapes"] != shapes(student):
        raise CheckpointError(
            f"{checkpoint} holds a model of another shape",
            "its tensors do not fit this one",
            "use another output folder, or the recipe that the run was started with",
        )
    optimizer = student.engine.optimizer
    _make_moments(optimizer, facts["optimizer_steps"])
    sources = {kind: CheckpointSource(checkpoint, kind, facts) for kind in (WEIGHTS, FIRST_MOMENTS, SECOND_MOMENTS)}
    for name, parameter in sharded_parameters(student.model):
        safe_set_local_fp32_param(parameter, read_shard(parameter, sources[WEIGHTS], name))
        for kind in (FIRST_MOMENTS, SECOND_MOMENTS):
            safe_set_local_optimizer_state(parameter, read_shard(parameter, sources[kind], name), kind)
    _refresh_working_weights(optimizer)
    if facts["ranks"] == distributed.world_size():
        rank, ranks = distributed.rank(), distributed.world_size()
        states = (checkpoint / f"random-{rank:05d}-of-{ranks:05d}.json").read_text(encoding="utf-8")
        _set_random_states(json.loads(states))
    return facts


def _make_moments(optimizer: Any, steps: int) -> None:
    """Create Adam's state, which otherwise exists only after its first step: loading needs it earlier."""
    for flat in optimizer.fp32_partitioned_groups_flat:
        state = optimizer.optimizer.state[flat]
        state["step"] = torch.tensor(float(steps), dtype=torch.float32)
        if optimizer.optimizer.defaults.get("fused"):
            state["step"] = state["step"].to(flat.device)  # torch's fused Adam needs its counter on the device
        state[FIRST_MOMENTS] = torch.zeros_like(flat)
        state[SECOND_MOMENTS] = torch.zeros_like(flat)


def _refresh_working_weights(optimizer: Any) -> None:
    """Copy the master weights to the shards that the forward pass gathers, and gather those that stay whole."""
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def _random_states() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state().tolist()}
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        states["accelerator"] = accelerator.get_rng_state().tolist()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = states["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    accelerator = get_accelerator()
    if "accelerator" in states and accelerator.device_name() != "cpu":
        accelerator.set_rng_state(torch.tensor(states["accelerator"], dtype=torch.uint8))
