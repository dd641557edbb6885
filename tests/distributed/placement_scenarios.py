"""Scenarios of a teacher in each place where its weights can live, on two ranks of a node and on four of two nodes."""

from pathlib import Path
from typing import Any

from deepspeed.utils import groups

from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config
from minima.engine.objectives.distillation import Distillation
from minima.engine.teacher.host import FrozenHost
from minima.errors import RecipeError
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource
from minima.recipe.distillation import Teacher
from tests.distributed.memory_scenarios import live_bytes
from tests.distributed.scenarios import CONFIGS, new_feed, new_student, run_training
from tests.distributed.tiny import VOCABULARY, config_of, training
from tools.bench.traffic import TrafficCounter

# A layer's three large matrices and neither embedding nor norms reach the megabyte per rank, of four ranks too, from
# which on DeepSpeed writes a shard to NVMe: some of every kind.
LARGE = ModelShape(
    vocabulary_size=VOCABULARY, hidden_size=256, intermediate_size=4200, num_layers=2, num_heads=4,
    num_key_value_heads=2, max_positions=32,
)  # fmt: skip
NVME_TENSORS = 3 * LARGE.num_layers
PLACES: dict[str, tuple[Any, Any]] = {
    "replica": ("replica", "none"), "zero3": ("zero3", "none"), "zero3_node": ("zero3_node", "none"),
    "tensor_parallel": ("tensor_parallel", "none"), "cpu": ("zero3", "cpu"), "node_cpu": ("zero3_node", "cpu"),
    "nvme": ("zero3", "nvme"), "node_nvme": ("zero3_node", "nvme"),
}  # fmt: skip


def large_source() -> RandomSource:
    return RandomSource(config_of(LARGE) | {"initializer_range": 0.05}, seed=2)


def host_in(place: str, folder: Path, windows: bool, precision: str = "float32") -> FrozenHost:
    placement, offload = PLACES[place]
    config = frozen_config(
        CONFIGS / Teacher.shipped_json(placement, offload),
        precision=precision,
        placement=placement,
        offload=offload,
        nvme_path=folder / "nvme",
        tensor_parallel_ranks=2,
    )
    return FrozenHost(large_source(), config, precision=precision, placement=placement, windows=windows)


def in_place(folder: Path, place: str, windows: tuple[int, ...]) -> dict[str, Any]:
    """A short run with a teacher there, what it holds, and what one step's traversals move, by the window."""
    found: dict[str, Any] = {}
    before = live_bytes()
    host = host_in(place, folder, windows=max(windows) > 1)
    for window in windows:
        settings = training(micro_batch_sequences=1, steps=2)
        objective = Distillation(host, window=window)
        student = new_student(settings)
        found[f"records-{window}"] = run_training(settings, objective, student, feed=new_feed(settings, packed=True))
        student.close()
        batches = new_feed(settings, packed=True).step(0)
        with TrafficCounter() as traffic:
            for start in range(0, len(batches), window):
                objective.prepare(batches[start : start + window])
        found[f"moved-{window}"] = dict(traffic.collectives)
    held = host.held_bytes()
    head_bytes = 0 if place == "replica" else host.head_VE.numel() * host.head_VE.element_size()
    del objective, student, batches
    distributed.barrier()
    found |= {
        "held": distributed.gather_objects(held),
        "live": live_bytes() - before - head_bytes,
        "files": sorted(path.stat().st_size for path in (folder / "nvme").rglob("*.swp")),
        "mpu": str(groups.mpu),
    }
    distributed.barrier()
    host.close()
    found["left"] = live_bytes() - before
    distributed.barrier()
    found["left_files"] = [str(path) for path in (folder / "nvme").rglob("*")]
    return found


def placements(folder: Path) -> Any:
    """On two ranks; a window is all that a rank has of a step's batch."""
    return {place: in_place(folder, place, (1, 4)) for place in PLACES}


def placements_on_nodes(folder: Path) -> Any:
    """The same on two nodes of two ranks; a window is all that a rank has of a step's batch."""
    assert distributed.node_ranks() == [[0, 1], [2, 3]]
    return {place: in_place(folder, place, (2,)) for place in PLACES}


def nvme_refused(folder: Path) -> Any:
    """What each rank says of folders in which no shard can be written, of which the last is rank 1's alone."""
    (folder / "file").touch()
    own = folder / "occupied" / "zero_stage_3" / "float32params"
    if distributed.is_main():
        own.mkdir(parents=True)
        (own / "rank1").touch()
    distributed.barrier()
    found: dict[str, Any] = {}
    for name, place in {"file": folder / "file", "none": Path("/proc/nowhere"), "occupied": own.parents[1]}.items():
        config = frozen_config(
            CONFIGS / Teacher.shipped_json("zero3", "nvme"), placement="zero3", offload="nvme", nvme_path=place,
            precision="float32",
        )  # fmt: skip
        try:
            FrozenHost(large_source(), config, precision="float32", placement="zero3")
            said = "nothing"
        except RecipeError as error:
            said = str(error)
        found[name] = distributed.gather_objects(said)
    found["left"] = [path.name for path in own.iterdir()]
    return found
