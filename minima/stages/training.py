"""The one assembly of a training run: data, student, objective, checkpoints and metrics. Stages differ in two of them."""

import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from minima.data.store import TokenStore
from minima.data.tokenizer import check_vocabulary
from minima.engine import distributed
from minima.engine.checkpoint.shards import load_shards, save_shards, shapes
from minima.engine.checkpoint.store import complete_steps, step_folder, write_checkpoint
from minima.engine.deepspeed_config import training_config
from minima.engine.loop import Events, train
from minima.engine.metrics import MetricsLog, read_records
from minima.engine.objectives.objective import Objective
from minima.engine.schedule import Schedule
from minima.engine.student import Student
from minima.engine.weights import open_weights
from minima.errors import RecipeError, ShapeError
from minima.evaluation.held_out import evaluate
from minima.launcher import terminal_columns
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, WeightSource, parameter_shapes
from minima.recipe.schema import Adapt, Distil, ModelInput
from minima.report.progress import Progress
from minima.stages.context import StageContext
from minima.stages.feed import Feed


@dataclass(frozen=True)
class Origin:
    """A model that a stage starts from.

    Attributes:
        source: its weights.
        identity: what checkpoints and cards call it.
        tokenizer: folder of its tokenizer; none when it has none.
    """

    source: WeightSource
    identity: str
    tokenizer: Path | None


def open_origin(context: StageContext, model: ModelInput, seed: int) -> Origin:
    """The weights that the recipe names.

    Raises:
        ShapeError: the recipe's `shape:` is not the model's.
    """
    if model.random is not None:
        return Origin(RandomSource(model.random.to_config(), seed), f"random weights, seed {seed}", None)
    resolved = context.model(model)
    source = open_weights(resolved.folder, resolved.step)
    if model.shape is not None:
        found = ModelShape.from_config(source.config)
        wrong = [
            f"{name} is {getattr(found, name)}, the recipe says {getattr(model.shape, name)}"
            for name in ("family", "vocabulary_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
            if getattr(found, name) != getattr(model.shape, name)
        ]
        if wrong:
            raise ShapeError(
                f"{resolved.name}: {'; '.join(wrong)}",
                "the run was planned for another model",
                "correct the recipe's `shape:` block, or name the model that it describes",
            )
    return Origin(source, resolved.name, resolved.tokenizer)


def run_training(
    context: StageContext,
    stage: Adapt | Distil,
    make_objective: Callable[[Path], Objective],
    frozen_flops_per_token: Callable[[int], float] = lambda sequence_length: 0.0,
    identities: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a stage's model, or go on from its newest checkpoint.

    Args:
        context: of the stage.
        stage: an adapt or distil stage.
        make_objective: gives the objective, from the data stage's folder; a teacher's engine is built in it, before
            the student's.
        frozen_flops_per_token: forward FLOPs of frozen models, from the sequence length.
        identities: what checkpoints say of frozen models.

    Returns:
        The stage's metrics.
    """
    data = context.data(stage.data)
    store, held_out = TokenStore.open(data / "train"), TokenStore.open(data / "held_out")
    origin = open_origin(context, stage.model, stage.seed)
    shape = ModelShape.from_config(origin.source.config)
    check_fit(shape, store, origin.identity)
    total_steps = stage.total_steps(store.sequence_length, len(store))
    if total_steps == 0:
        raise RecipeError(
            f"stage {stage.name!r} has less than one sequence to train on",
            "no step would be made",
            f"give it at least {store.sequence_length} tokens",
        )
    if stage.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(stage.seed)
    config = training_config(context.deepspeed_json(stage.deepspeed), stage, distributed.world_size())
    objective = make_objective(data)
    student = Student(origin.source, config, stage)
    run = _Run(context, stage, student, store, held_out, shape, frozen_flops_per_token, origin, identities or {})
    first_step = run.resume()
    batches = Feed(
        store,
        seed=stage.seed,
        batch_sequences=stage.batch_sequences,
        micro_batch_sequences=stage.micro_batch_sequences,
        total_sequences=stage.total_sequences(store.sequence_length, len(store)),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=student.device,
    )
    schedule = Schedule(
        total_steps,
        stage.learning_rate,
        stage.warmup(total_steps),
        stage.schedule,
        stage.final_learning_rate_fraction,
    )
    if distributed.is_main():
        shutil.copytree(data / "tokenizer", context.folder / "tokenizer", dirs_exist_ok=True)
    try:
        run.start(first_step, total_steps)
        train(student, objective, batches, schedule, run.events(), first_step)
        return run.metrics()
    finally:
        run.close()
        student.close()


def check_fit(shape: ModelShape, store: TokenStore, model: str) -> None:
    """Refuse data that the model cannot read.

    Raises:
        TokenizerMismatch: the store has token ids that the model does not know.
        ShapeError: its blocks are longer than the model's positions.
    """
    check_vocabulary(store.vocabulary_size, shape.vocabulary_size, str(store.folder), model)
    if store.sequence_length > shape.max_positions:
        raise ShapeError(
            f"blocks of {store.sequence_length} tokens for {model}, made for {shape.max_positions} positions",
            "beyond them its positions mean nothing to it",
            f"build the data with sequence_length {shape.max_positions} or less",
        )


class _Run:
    """What happens around the loop: checkpoints, held-out losses, metrics and the line that a person sees."""

    def __init__(
        self,
        context: StageContext,
        stage: Adapt | Distil,
        student: Student,
        store: TokenStore,
        held_out: TokenStore,
        shape: ModelShape,
        frozen_flops_per_token: Callable[[int], float],
        origin: Origin,
        identities: dict[str, Any],
    ) -> None:
        self.context, self.stage, self.student = context, stage, student
        self.store, self.held_out, self.shape = store, held_out, shape
        length = store.sequence_length
        self.flops_per_token = shape.training_flops_per_token(length) + frozen_flops_per_token(length)
        self.facts = {"model": origin.identity, "data": store.sha256(), **identities}
        self.log: MetricsLog | None = None
        self.progress: Progress | None = None
        self.last: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}

    def resume(self) -> int:
        """Load the newest complete checkpoint, if there is one; returns the finished steps."""
        steps = complete_steps(self.context.folder / "checkpoints")
        if not steps:
            return 0
        facts = load_shards(self.student, step_folder(self.context.folder / "checkpoints", steps[-1]))
        return facts["step"]

    def start(self, first_step: int, total_steps: int) -> None:
        """Open the metrics and the progress line."""
        if not distributed.is_main():
            return
        self.log = MetricsLog(
            self.context.folder,
            first_step,
            tensorboard=self.stage.tensorboard,
            wandb_project=self.stage.wandb_project,
            config=self.stage.model_dump(mode="json"),
        )
        self.progress = Progress(self.stage.name, total_steps, first_step, columns=terminal_columns())
        parameters = f"{self.shape.parameters:,} parameters"
        tokens = f"{total_steps * self.stage.batch_sequences * self.store.sequence_length:,} tokens"
        self.progress.note(f"{parameters}, {total_steps:,} steps, {tokens}")
        if first_step:
            self.progress.note(f"resuming after step {first_step}")

    def events(self) -> Events:
        """What the loop calls."""
        stage = self.stage
        return Events(
            self.write, self.evaluate, self.save, stage.log_every_steps, stage.evaluate_every_steps,
            stage.checkpoint_every_steps,
        )

    def write(self, step: int, record: dict[str, float]) -> None:
        """One record of training metrics."""
        steps, seconds = record.pop("steps"), record.pop("seconds")
        valid = record.pop("tokens")
        tokens = steps * self.stage.batch_sequences * self.store.sequence_length
        speed = tokens / max(seconds, 1e-9)
        self.last = {
            "step": step,
            **record,
            "valid_tokens": int(valid),
            "sequences": step * self.stage.batch_sequences,
            "tokens": step * self.stage.batch_sequences * self.store.sequence_length,
            "tokens_per_second": speed,
            "model_flops_per_second": speed * self.flops_per_token,
            "memory_bytes": _peak_memory_bytes(),
        }
        if self.log is not None and self.progress is not None:
            self.log.write(self.last)
            facts = {name: f"{record[name]:.4f}" for name in ("loss", "hard", "soft") if name in record}
            facts |= {"lr": f"{record['learning_rate']:.2e}", "norm": f"{record['gradient_norm']:.3f}"}
            self.progress.update(step, facts | {"tokens/s": f"{speed:,.0f}"})

    def evaluate(self, step: int) -> None:
        """Held-out loss of the student as it is."""
        with self.student.measured() as view:
            scores = evaluate(
                view,
                self.held_out,
                sequences=self.stage.evaluate_sequences,
                micro_batch_sequences=self.stage.micro_batch_sequences,
                name=self.stage.name,
            )
        self.evaluated = {"held_out_loss": scores.loss, "held_out_perplexity": scores.perplexity}
        if self.log is not None and self.progress is not None:
            self.log.write({"step": step, **self.evaluated})
            self.progress.note(f"step {step}: held-out loss {scores.loss:.4f}, perplexity {scores.perplexity:.2f}")

    def save(self, step: int) -> None:
        """A checkpoint after `step` updates."""
        facts = {
            "step": step,
            "optimizer_steps": step,
            "sequences": step * self.stage.batch_sequences,
            "tokens": step * self.stage.batch_sequences * self.store.sequence_length,
            "ranks": distributed.world_size(),
            "config": self.student.config,
            "shapes": shapes(self.student),
            **self.facts,
        }
        folder = self.context.folder / "checkpoints"
        write_checkpoint(folder, step, lambda path: save_shards(self.student, path), facts, self.stage.keep_checkpoints)

    def metrics(self) -> dict[str, Any]:
        """What the manifest says."""
        if not self.last:  # every step was done before this start
            records = [record for record in read_records(self.context.folder / "metrics.jsonl") if "loss" in record]
            self.last = records[-1] if records else {}
        kept = ("step", "sequences", "tokens", "loss", "hard", "soft", "kl", "tokens_per_second", "memory_bytes")
        final = {name: self.last[name] for name in kept if name in self.last}
        return {"parameters": self.shape.parameters, **final, **self.evaluated}

    def close(self) -> None:
        """Flush what is open."""
        if self.log is not None:
            self.log.close()
        if self.progress is not None:
            self.progress.close()


def _peak_memory_bytes() -> int:
    """The accelerator's peak on this rank; on a CPU the process's."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(accelerator.max_memory_allocated())
