"""Scenarios of preference optimisation: the objective in the loop, and the whole align stage."""

import json
from pathlib import Path
from typing import Any

import torch

from minima.engine import distributed
from minima.engine.deepspeed_config import frozen_config
from minima.engine.meters import Meters
from minima.engine.objectives.preference import Preference
from minima.engine.reference import HostReference, KeptReference
from minima.engine.teacher.host import FrozenHost
from minima.evaluation.kept_reference import keep_references
from minima.launcher import read_launch
from minima.models.weights import RandomSource
from minima.recipe.schema import Recipe
from minima.stages import align
from minima.stages.context import StageContext
from minima.stages.feed import Feed
from tests.distributed.scenarios import CONFIGS, HostReads, new_student, run_training
from tests.distributed.tiny import STUDENT, config_of, training
from tests.pairs import write_pairs

BLOCKS, SEED = 20, 5
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.5, "loss": "ipo", "length_normalised": True},
}


def settings_of(**changes: Any) -> Any:
    """1.8 epochs: the last of five steps is half empty."""
    return training(steps=None, epochs=1.8, **changes)


def reference_source() -> RandomSource:
    return RandomSource(config_of(STUDENT), seed=7)


def reference_host() -> FrozenHost:
    config = frozen_config(CONFIGS / "teacher_zero3.json", precision="float32")
    return FrozenHost(reference_source(), config, precision="float32")


def pairs_in(folder: Path, name: str, num_blocks: int = BLOCKS, seed: int = SEED) -> Any:
    """A store that rank 0 writes and every rank opens."""
    if distributed.is_main():
        write_pairs(folder / name, num_blocks, seed)
    distributed.barrier()
    return align.TokenStore.open(folder / name)


def feed_of(store: Any, settings: Any) -> Feed:
    return Feed(
        store, seed=settings.seed, batch_sequences=settings.batch_sequences,
        micro_batch_sequences=settings.micro_batch_sequences,
        total_sequences=settings.total_sequences(store.sequence_length, len(store)),
        rank=distributed.rank(), world_size=distributed.world_size(), device=distributed.device(),
    )  # fmt: skip


def preference(folder: Path) -> Any:
    """Both losses, the first in micro-batches of 1, 2 and 4, and with reference values made before."""
    store = pairs_in(folder, "pairs")
    host = reference_host()
    live, found = HostReference(host), {}
    runs = [("sigmoid", 1, live), ("sigmoid", 2, live), ("sigmoid", 4, live), ("ipo", 2, live)]
    [kept] = keep_references(
        folder / "cache", [store], reference_host, model="the reference", precision="float32", micro_batch_sequences=3
    )
    for kind, micro_batch, reference in [*runs, ("sigmoid", 2, kept)]:
        settings = settings_of(micro_batch_sequences=micro_batch)
        student = new_student(settings)
        steps = settings.total_steps(store.sequence_length, len(store))
        objective = Preference(reference, chunk_tokens=9, **KINDS[kind])
        name = f"{kind}-{micro_batch}{'-kept' if isinstance(reference, KeptReference) else ''}"
        found[name] = run_training(
            settings.model_copy(update={"steps": steps}), objective, student, feed=feed_of(store, settings)
        )
        student.close()
    host.close()
    return found


def preference_host_reads(folder: Path) -> Any:
    """Values that each micro-step of the second step reads on the host, with a running and with a kept reference."""
    store, found = pairs_in(folder, "read"), {}
    settings = settings_of(micro_batch_sequences=1)
    host, student = reference_host(), new_student(settings)
    for name, reference in (("running", HostReference(host)), ("kept", KeptReference(torch.zeros(BLOCKS, 8)))):
        objective, meters = Preference(reference), Meters(student.device)
        for step in range(2):
            found[name] = []
            for micro_batch in feed_of(store, settings).step(step):
                with HostReads() as reads:
                    objective.count(micro_batch)
                    [batch] = objective.prepare([micro_batch])
                    loss = student(objective, batch)
                    student.backward(loss.total / 10)
                    meters.add(loss)
                    student.step(1e-3)
                found[name].append(reads.count)
    student.close()
    host.close()
    return found


def align_stage(folder: Path) -> Any:
    """The stage with a reference that runs, with one whose values are kept, and with values found from before."""
    pairs_in(folder / "data", "train")
    pairs_in(folder / "data", "held_out", num_blocks=3, seed=100)
    (folder / "data" / "tokenizer").mkdir(exist_ok=True)
    common = {
        "kind": "align", "model": {"random": STUDENT.model_dump()}, "data": str(folder / "data"), "beta": 0.5,
        "batch_sequences": 8, "micro_batch_sequences": 2, "epochs": 2.5, "learning_rate": 5e-3, "warmup_steps": 2,
        "precision": "float32", "log_every_steps": 1, "evaluate_every_steps": 3, "tensorboard": False,
    }  # fmt: skip
    stages = [
        common | {"name": "running"},
        common | {"name": "kept", "precompute_reference": True},
        common | {"name": "found", "precompute_reference": True},
        common | {"name": "against_another", "reference": {"random": STUDENT.model_dump()}, "loss": "ipo"},
    ]
    recipe = Recipe.model_validate({"name": "pairs", "stages": stages})
    launch = read_launch()
    found, built = {}, []
    host_class = align.FrozenHost
    align.FrozenHost = lambda *given, **named: built.append(1) or host_class(*given, **named)
    for stage in recipe.stages:
        own = folder / "run" / stage.name
        own.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        built.clear()
        metrics = align.run(StageContext(recipe, folder / "recipe.json", stage, own, folder / "run", launch))
        distributed.barrier()
        lines = (own / "metrics.jsonl").read_text().splitlines()
        found[stage.name] = {"metrics": metrics, "records": list(map(json.loads, lines)), "built": len(built)}
    align.FrozenHost = host_class
    return found
