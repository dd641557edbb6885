"""Scenarios of memory: the bytes of all live tensors, for a middling student and for its teacher in every place."""

import collections
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from minima.batch import Batch, make_batch
from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config, training_config
from minima.engine.loop import train_step
from minima.engine.memory import return_unused
from minima.engine.meters import Meters
from minima.engine.objectives.language_modelling import LanguageModelling
from minima.engine.student import Student
from minima.engine.teacher.host import FrozenHost
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource
from minima.pruning.importance import importance
from tests.distributed.scenarios import CONFIGS
from tests.distributed.tiny import training
from tools.bench.traffic import TrafficCounter

# Large enough for its tensors to outweigh all else that a process keeps, small enough to be made in a second.
MIDDLING = ModelShape(
    vocabulary_size=2003, hidden_size=192, intermediate_size=520, num_layers=3, num_heads=6, num_key_value_heads=2,
    max_positions=64,
)  # fmt: skip
LENGTH, WINDOW = 32, 4
# The shipped bucket of 5e7 gradients would outweigh everything else here.
SIZES = {
    "reduce_bucket_size": 200_000, "stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1000,
    "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 1_500_000, "sub_group_size": 150_000,
}  # fmt: skip
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "reuse": ("bfloat16", {"stage3_max_reuse_distance": 500_000}),
    "offload": ("bfloat16", {"offload_optimizer": {"device": "cpu"}}),
}
LIVE = (500_000, 1_500_000)  # weights that may stay whole where a model's importance is measured; a layer has 410,000
TEACHERS = {"replica": "teacher_replica.json", "zero3": "teacher_zero3.json", "zero3_node": "teacher_zero3_node.json"}
TEACHERS |= {"tensor_parallel": "teacher_tensor_parallel.json"}


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python can reach, of each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Not isinstance(), which asks the thing for its class: DeepSpeed deprecates some names in a way that prints.
        if not issubclass(type(thing), torch.Tensor):
            continue
        try:
            device = thing.device
        except RuntimeError:  # PyTorch 2.9's collector can leave the Python object of a tensor that is gone
            continue
        if device.type != "meta":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def watched(run: Callable[[], Any], turns: int = 1) -> dict[str, int]:
    """What happened while `run` ran; of several turns, in the one with the lowest peak.

    Returns:
        `peak`: bytes that the allocator had given out at most, beyond those before it; `gathered` and `scattered`:
        elements of whole tensors in collectives.
    """
    # What gloo's own threads give back last is not seen, and what they copy is, so that a peak may be too high by a
    # tensor, and never too low.
    return min((_watched(run) for _ in range(turns)), key=lambda found: found["peak"])


def _watched(run: Callable[[], Any]) -> dict[str, int]:
    gc.collect()  # what is given back meanwhile, of something before, would be taken off the peak
    settings: dict[str, Any] = {"profile_memory": True, "record_shapes": True}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **settings) as profile:
        run()
    assert profile.profiler is not None
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    found = {"peak": max(held), "gathered": 0, "scattered": 0}
    whole = {"c10d::_allgather_base_": ("gathered", 0), "c10d::_reduce_scatter_base_": ("scattered", 1)}
    for event in events:
        if event.name() in whole:
            name, argument = whole[event.name()]
            found[name] += math.prod(event.shapes()[argument])
    return found


class NodeTraffic(TrafficCounter):
    """Also tells apart groups of ranks: bytes that this rank receives, by the group's ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: collections.Counter[tuple[int, ...]] = collections.Counter()

    def _collective(self, name: str, args: Any, kwargs: Any) -> None:
        before = self.collective_bytes
        super()._collective(name, args, kwargs)
        boxes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.ScriptObject)]
        names = [dist.ProcessGroup.unbox(box).group_name for box in boxes if "ProcessGroup" in str(box._type())]
        ranks = dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(names[0]))
        self.groups[tuple(ranks)] += self.collective_bytes - before

    def by_node(self, per_node: int) -> dict[str, float]:
        """Bytes from ranks of the same node and of others, in rings: a node's first rank receives from another node."""
        found = {"within": 0.0, "between": 0.0}
        for ranks, size in self.groups.items():
            between = size / per_node if len({rank // per_node for rank in ranks}) > 1 else 0.0
            found["between"] += between
            found["within"] += size - between
        return found


def one_batch(sequences: int) -> Batch:
    generator = torch.Generator().manual_seed(distributed.rank())
    tokens_BT = torch.randint(0, MIDDLING.vocabulary_size, (sequences, LENGTH), generator=generator)
    return make_batch(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool)).to(distributed.device())


def memory_student(folder: Path) -> Any:
    """Bytes that a student adds, once it is built and once it has made two steps."""
    found = {}
    for name, (precision, changes) in STUDENTS.items():
        path = folder / f"memory-{name}-{distributed.rank()}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, **SIZES, **changes}}))
        settings = training(precision=precision)
        config = training_config(path, settings, distributed.world_size(), MIDDLING)
        before = live_bytes()
        student = Student(RandomSource(MIDDLING.to_config(), seed=1), config, settings)
        built = live_bytes() - before
        for _ in range(2):
            train_step(student, LanguageModelling(), [one_batch(2), one_batch(2)], 1e-3, Meters(student.device))
        stepped = live_bytes() - before
        batches = [one_batch(16), one_batch(16)]
        step = functools.partial(train_step, student, LanguageModelling(), batches, 1e-3, Meters(student.device))
        found[name] = {"built": built, "stepped": stepped} | watched(step)
        student.close()
    return found


def memory_on_nodes(folder: Path) -> Any:
    """Bytes that a student and its teacher add on four ranks of two nodes, and what they move within and between."""
    assert distributed.node_ranks() == [[0, 1], [2, 3]]
    found: dict[str, Any] = {}
    path = folder / f"nodes-{distributed.rank()}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **SIZES}}))
    settings = training(precision="bfloat16")
    before = live_bytes()
    config = training_config(path, settings, distributed.world_size(), MIDDLING)
    student = Student(RandomSource(MIDDLING.to_config(), seed=1), config, settings)
    batches, meters = [one_batch(2), one_batch(2)], Meters(student.device)
    for turn in range(3):  # the first steps record in which order weights are needed
        with NodeTraffic() if turn == 2 else contextlib.nullcontext() as traffic:
            train_step(student, LanguageModelling(), batches, 1e-3, meters)
    found["student"] = {"live": live_bytes() - before} | traffic.by_node(2)
    student.close()
    del student, meters
    for placement in ("zero3", "zero3_node", "tensor_parallel"):
        before = live_bytes()
        host = new_host(placement, "bfloat16")
        for turn in range(3):
            with NodeTraffic() if turn == 2 else contextlib.nullcontext() as traffic:
                host.hidden_states(batches[0])
        head_VE = host.head_VE
        found[placement] = {"live": live_bytes() - before} | traffic.by_node(2)
        del head_VE
        host.close()
    return found


def new_host(placement: Any, precision: str, **changes: Any) -> FrozenHost:
    path = CONFIGS / TEACHERS[placement]
    config = frozen_config(path, precision=precision, placement=placement, tensor_parallel_ranks=2)
    source = RandomSource(MIDDLING.to_config(), seed=2)
    return FrozenHost(source, config, precision=precision, placement=placement, **changes)


def memory_teacher(folder: Path) -> Any:
    """Bytes that a teacher adds, once it has given hidden states and its head; and at most, while it gives them."""
    found: dict[str, Any] = {}
    for placement in TEACHERS:
        for precision in ("float32", "bfloat16"):
            before = live_bytes()
            host = new_host(placement, precision)
            host.hidden_states(one_batch(2))
            head_VE = host.head_VE
            found[f"{placement}-{precision}"] = live_bytes() - before
            del head_VE
            host.close()
    for precision in ("float32", "bfloat16"):
        host = new_host("zero3", precision, windows=True)
        for window in (1, WINDOW):
            batches = [one_batch(16) for _ in range(window)]
            for _ in range(2):  # the first pass records in which order weights are needed
                host.window(batches)
            found[f"window-{window}-{precision}"] = watched(functools.partial(host.window, batches))
        host.close()
    found["split"] = split_peak()
    return found


def split_peak() -> dict[str, int]:
    """What memory of this process grows by, at most, while a model of 0.1 GB is split, and what is kept of it."""
    larger = {"hidden_size": 512, "intermediate_size": 1376, "num_layers": 8, "num_heads": 8}
    shape = MIDDLING.model_copy(update=larger)
    source = RandomSource(shape.to_config(), seed=2)

    def resident(which: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))

    # What glibc keeps of freed tensors, more or less of it by chance, would be taken again and not be seen. With every
    # tensor in pages of its own there is nothing to keep.
    mallopt, mmap_threshold = ctypes.CDLL(None).mallopt, -3
    mallopt(mmap_threshold, 1 << 16)
    return_unused()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    config = frozen_config(CONFIGS / TEACHERS["tensor_parallel"], precision="float32", placement="tensor_parallel",
                           tensor_parallel_ranks=2)  # fmt: skip
    host = FrozenHost(source, config, precision="float32", placement="tensor_parallel")
    found = {"peak": resident("VmHWM") - before, "held": host.held_bytes()["device"], "whole": 4 * shape.parameters}
    host.close()
    mallopt(mmap_threshold, 32 << 20)  # the most that glibc comes to by itself
    return found


def memory_scored(folder: Path) -> Any:
    """Bytes that a model adds whose importance is measured, and at most, while it is; by live weights and precision."""
    found = {}
    for live, precision in itertools.product(LIVE, ("float32", "bfloat16")):
        path = folder / f"memory-scored-{live}-{distributed.rank()}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, **SIZES, "stage3_max_live_parameters": live}}))
        before = live_bytes()
        config = frozen_config(path, precision=precision)
        source = RandomSource(MIDDLING.to_config(), seed=2)
        host = FrozenHost(source, config, precision=precision, activation_checkpointing=True)
        built = live_bytes() - before

        def score(batches: int, host: FrozenHost = host) -> None:
            importance(host.run, host.model, [one_batch(16)] * batches, MIDDLING, identity="middling",
                       all_reduce_sum=distributed.all_reduce_sum, device=host.device)  # fmt: skip

        score(2)  # the first batch records in which order weights are needed
        found[f"{live}-{precision}"] = {"built": built} | watched(functools.partial(score, 1), turns=3)
        host.close()
    return found
