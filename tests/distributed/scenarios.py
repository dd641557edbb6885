"""What runs on every rank. Each scenario takes a folder and returns what rank 0 writes down for the tests."""

import importlib
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_local_fp32_param

from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config, training_config
from minima.engine.determinism import fix_bits
from minima.engine.loop import Events, train
from minima.engine.meters import Meters
from minima.engine.objectives.distillation import Distillation
from minima.engine.objectives.language_modelling import LanguageModelling
from minima.engine.schedule import Schedule
from minima.engine.sharded import read_shard, sharded_parameters
from minima.engine.student import Student
from minima.engine.teacher.host import FrozenHost
from minima.errors import DataError, NotFinite
from minima.launcher import read_launch
from minima.models.weights import tensor_sha256
from tests.distributed.tiny import TinyFeed, student_source, teacher_source, training
from tests.fakes import HostReads

CONFIGS = Path(__file__).parents[2] / "ds_configs"


def teacher_host(precision: str = "float32") -> FrozenHost:
    config = frozen_config(CONFIGS / "teacher_zero3.json", precision=precision)
    return FrozenHost(teacher_source(), config, precision=precision)


def new_student(settings) -> Student:
    config = training_config(CONFIGS / "student_zero3.json", settings, distributed.world_size())
    return Student(student_source(), config, settings)


def new_feed(settings, packed: bool = False) -> TinyFeed:
    place = distributed.rank(), distributed.world_size(), distributed.device()
    return TinyFeed(settings.micro_batch_sequences, *place, packed=packed)


def run_training(settings, objective, student, *, first_step=0, save=None, feed=None) -> list[dict[str, float]]:
    records: list[dict[str, float]] = []
    events = Events(
        log=lambda step, record: records.append({"step": step, **record}),
        evaluate=lambda step: False,
        save=save or (lambda step: None),
        writing=lambda: False,
        settle=lambda: None,
        log_every=1,
        evaluate_every=0,
        save_every=3,
    )
    schedule = Schedule(settings.steps, settings.learning_rate, settings.warmup_steps, "cosine", 0.1)
    feed = feed or new_feed(settings)
    train(student, objective, feed, schedule, events, first_step)
    return records


def weight_hashes(student: Student) -> dict[str, str]:
    """A hash of this rank's working shard of every parameter, for all ranks."""
    mine = {name: tensor_sha256(parameter.ds_tensor) for name, parameter in student.model.named_parameters()}
    gathered = distributed.gather_objects(mine)
    return {f"{rank}:{name}": digest for rank, hashes in enumerate(gathered) for name, digest in hashes.items()}


def shared_memory(folder: Path) -> Any:
    """What this group has put into the machine's shared memory; DeepSpeed's files there carry the port."""
    distributed.barrier()
    return sorted(path.name for path in Path("/dev/shm").glob(f"*_{read_launch().master_port}_*"))


def language_modelling(folder: Path) -> Any:
    settings = training()
    return run_training(settings, LanguageModelling(), new_student(settings))


def distillation(folder: Path) -> Any:
    """Both loss weights at a temperature, in micro-batches of 1, 2 and 4."""
    found = {}
    host = teacher_host()
    for micro_batch in (1, 2, 4):
        settings = training(micro_batch_sequences=micro_batch)
        objective = Distillation(host, hard_weight=0.3, soft_weight=0.7, temperature=2.0, chunk_tokens=5)
        student = new_student(settings)
        found[str(micro_batch)] = run_training(settings, objective, student)
        student.close()
    host.close()
    return found


def packed(folder: Path) -> Any:
    """Rows of several documents: distillation, and instruction tuning with noise in micro-batches of 1 and 4."""
    found = {}
    host = teacher_host()
    settings = training()
    objective = Distillation(host, hard_weight=0.3, soft_weight=0.7, temperature=2.0, chunk_tokens=5)
    student = new_student(settings)
    found["distillation"] = run_training(settings, objective, student, feed=new_feed(settings, packed=True))
    student.close()
    host.close()
    for micro_batch, alpha in ((1, 5.0), (4, 5.0), (4, 0.0)):
        settings = training(micro_batch_sequences=micro_batch)
        student, noisy = new_student(settings), LanguageModelling(neftune_alpha=alpha, seed=3)
        found[f"noise-{micro_batch}-{alpha:g}"] = run_training(
            settings, noisy, student, feed=new_feed(settings, packed=True)
        )
        student.close()
    return found


class NanTeacher(Distillation):
    """Says NaN in the first micro-batch of step 3 (two a step on each rank)."""

    calls = 0

    def prepare(self, batches):
        self.calls += 1
        prepared = super().prepare(batches)
        if self.calls == 5:
            prepared[0].teacher_hidden_BTE[0, 0, 0] = float("nan")
        return prepared


class InfiniteLoss(Distillation):
    """A loss that is infinite on rank 0 alone at step 3, with gradients that are finite."""

    calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        loss = super().__call__(model, batch)
        if self.calls == 5 and distributed.rank() == 0:
            return loss._replace(total=loss.total + float("inf"))
        return loss


def not_finite(folder: Path) -> Any:
    """A run that meets bad numbers at step 3: it ends there, and no weight has moved since step 2."""
    found = {}
    for precision in ("float32", "bfloat16"):
        for kind in (NanTeacher, InfiniteLoss):
            settings = training(precision=precision)
            student, host = new_student(settings), teacher_host(precision)
            before: dict[str, str] = {}
            feed = new_feed(settings)

            class Watched:
                def step(self, step: int, before=before, student=student, feed=feed):
                    before.clear()
                    before.update(weight_hashes(student))
                    return feed.step(step)

            try:
                run_training(settings, kind(host), student, feed=Watched())
                error = ""
            except NotFinite as caught:
                error = str(caught)
            unchanged = before == weight_hashes(student)
            found[f"{kind.__name__}-{precision}"] = {"error": error, "unchanged": unchanged}
            student.close()
            host.close()
    return found


def closing(folder: Path) -> Any:
    """Whether shards, master weights and Adam's states are gone once an engine is closed."""
    settings = training(steps=1)
    student, host = new_student(settings), teacher_host()
    run_training(settings, Distillation(host), student)
    optimizer = student.engine.optimizer
    watched = {
        "master": weakref.ref(optimizer.fp32_partitioned_groups_flat[0]),
        "moment": weakref.ref(next(iter(optimizer.optimizer.state.values()))["exp_avg"]),
    }
    shards = [parameter.ds_tensor for owner in (student, host) for _, parameter in sharded_parameters(owner.model)]
    del optimizer
    student.close()
    host.close()
    held = {name: reference() is not None for name, reference in watched.items()}
    return held | {"shards": any(shard.numel() for shard in shards)}


class Zeros:
    """A larger model, in shards of a few MB, as a much larger one on many ranks has."""

    config = teacher_source().config | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5}

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start)


def resident(folder: Path) -> Any:
    """Resident bytes of this process: before a model, with it, and once it is closed; of the second such model."""
    config, found = frozen_config(CONFIGS / "teacher_zero3.json", precision="float32"), []
    for _ in range(2):
        found = [psutil.Process().memory_info().rss]
        host = FrozenHost(Zeros(), config, precision="float32")
        found.append(psutil.Process().memory_info().rss)
        host.close()
        found.append(psutil.Process().memory_info().rss)
    return found


def host_reads(folder: Path) -> Any:
    """Values that each micro-step of the second and third step reads on the host; the first step records traces."""
    settings = training(micro_batch_sequences=1)
    student, host = new_student(settings), teacher_host()
    objective, meters, found = Distillation(host), Meters(student.device), []
    for step in range(3):
        found.append([])
        for micro_batch in new_feed(settings).step(step):
            with HostReads() as reads:
                for batch in objective.prepare([micro_batch]):
                    loss = student(objective, batch)
                    student.backward(loss.total / 10)
                    meters.add(loss)
                    student.step(1e-3)
            found[-1].append(reads.count)
    student.close()
    host.close()
    return found[1:]


def distillation_alone(folder: Path) -> Any:
    """On one rank: eight micro-batches of one sequence, and one of eight."""
    found = {}
    for micro_batch in (1, 8):
        settings = training(micro_batch_sequences=micro_batch)
        student, host = new_student(settings), teacher_host()
        objective = Distillation(host, hard_weight=0.3, soft_weight=0.7, temperature=2.0, chunk_tokens=5)
        found[str(micro_batch)] = run_training(settings, objective, student)
        student.close()
        host.close()
    return found


def rotary(folder: Path) -> Any:
    """Rotary frequencies of a bfloat16 engine, which a cast would ruin."""
    host = teacher_host("bfloat16")
    buffers = {name: str(buffer.dtype) for name, buffer in host.model.named_buffers()}
    values = host.model.model.rotary_emb.inv_freq.tolist()
    return {"dtypes": buffers, "inv_freq": values, "weights": str(host.head_VE.dtype)}


def shard_dtypes(folder: Path) -> Any:
    """The shards' dtypes where the processor has float16 arithmetic and where it has none."""
    found, accelerator = {}, get_accelerator()
    before = accelerator.is_fp16_supported
    for supported in (True, False):
        accelerator.is_fp16_supported = lambda supported=supported: supported
        for precision in ("float32", "bfloat16"):
            host = teacher_host(precision)
            found[f"{precision}, {supported}"] = sorted({str(p.ds_tensor.dtype) for p in host.model.parameters()})
            host.close()
    accelerator.is_fp16_supported = before
    return found


def bfloat16_start(folder: Path) -> Any:
    """How far a bfloat16 student's master weights are from the float32 weights that it starts from."""
    student, source = new_student(training(precision="bfloat16")), student_source()
    worst = 0.0
    for name, parameter in sharded_parameters(student.model):
        master = safe_get_local_fp32_param(parameter)
        worst = max(worst, (master - read_shard(parameter, source, name)).abs().max().item())
        assert (parameter.ds_tensor == master.to(torch.bfloat16)).all(), name
    return max(distributed.gather_objects(worst))


def rank_0_alone(folder: Path) -> Any:
    """What each rank gets of work that rank 0 does, and what each raises where rank 0 refuses it."""

    def refused() -> int:
        raise DataError("no text", "it is needed", f"give some to rank {distributed.rank()}")

    made = distributed.on_main(lambda: 7 + distributed.rank())
    try:
        distributed.on_main(refused)
    except DataError as error:
        return distributed.gather_objects([made, str(error)])


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    distributed.start(read_launch())
    if distributed.device().type == "cuda":
        fix_bits()
    known = globals()
    for others in ("checkpoint", "preference", "step", "memory", "placement"):  # which import this file
        known = vars(importlib.import_module(f"tests.distributed.{others}_scenarios")) | known
    results = {name: known[name](folder) for name in names}
    if distributed.is_main():
        (folder / "results.json").write_text(json.dumps(results))
    distributed.barrier()
    distributed.leave()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
