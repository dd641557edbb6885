"""What happens around the training loop: checkpoints, held-out losses, metrics and progress lines."""

import json
import resource
from collections.abc import Callable
from typing import Any

from deepspeed.accelerator import get_accelerator

from minima.data.store import TokenStore
from minima.disk import write_json
from minima.disk_errors import disk_full_named
from minima.engine import distributed
from minima.engine.checkpoint.shards import shapes, snapshot_shards
from minima.engine.checkpoint.store import drop_after, read_marker
from minima.engine.checkpoint.writer import CheckpointWriter
from minima.engine.loop import Events
from minima.engine.metrics import MetricsLog, last_with
from minima.engine.patience import Patience
from minima.engine.student import Student, StudentView
from minima.engine.watchdog import Watchdog
from minima.errors import CheckpointError
from minima.evaluation.held_out import evaluate
from minima.launcher import terminal_columns
from minima.models.layout import complete_steps, step_folder
from minima.models.shape import ModelShape
from minima.recipe.references import named_steps
from minima.recipe.schema import AnyTraining
from minima.report.progress import Progress
from minima.stages.context import StageContext
from minima.stages.resume import load_newest

ENDED = "ended.json"  # records the end of a run with patience
PARTS = ("loss", "hard", "soft", "kl", "accuracy", "margin")  # values of a training record that the progress line shows
Measure = Callable[[StudentView, TokenStore, int | None, int], dict[str, float]]


def held_out_loss(
    view: StudentView, store: TokenStore, sequences: int | None, micro_batch_sequences: int
) -> dict[str, float]:
    """Loss and perplexity of the student in its current state; every rank calls it.

    Args:
        sequences: use at most this many of them.
    """
    scores = evaluate(view, store, sequences=sequences, micro_batch_sequences=micro_batch_sequences, name="the student")
    return {"held_out_loss": scores.loss, "held_out_perplexity": scores.perplexity}


class TrainingRun:
    """The state of one training stage around its loop."""

    def __init__(
        self,
        *,
        context: StageContext,
        stage: AnyTraining,
        student: Student,
        store: TokenStore,
        held_out: TokenStore,
        shape: ModelShape,
        flops_per_token: float,
        facts: dict[str, Any],
        measure: Measure,
        counted: str,
    ) -> None:
        self.context, self.stage, self.student = context, stage, student
        self.store, self.held_out, self.shape = store, held_out, shape
        self.flops_per_token, self.facts = flops_per_token, facts
        self.log: MetricsLog | None = None
        self.progress: Progress | None = None
        self.measure, self.counted = measure, counted
        self.last: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}
        self.patience = Patience(stage.patience)
        self.checkpoints = context.folder / "checkpoints"
        named = named_steps(context.recipe, stage.name)
        self.writer = CheckpointWriter(self.checkpoints, stage.keep_checkpoints, stage.keep_every_steps, named)
        self.watchdog = Watchdog(stage.watchdog_seconds)
        self.step = self.total = 0  # finished steps, and the tokens or pairs counted in them
        self.ended: dict[str, Any] | None = None  # content of ENDED, if an earlier start finished training

    def resume(self) -> int:
        """Load the newest complete checkpoint, if there is one; returns the number of finished steps."""
        facts = load_newest(self.student, self.checkpoints)
        # Another node's view of the folder may be older, so rank 0's is used.
        self.ended = distributed.broadcast_object(self._read_end() if distributed.is_main() else None)
        if facts is None:
            return 0
        checkpoint = step_folder(self.checkpoints, facts["step"])
        if "counted" not in facts:
            raise CheckpointError(
                f"{checkpoint} was written by an earlier version of minima",
                "it does not record the counts up to it, so the run's numbers would be wrong",
                f"remove {self.context.folder} to train the stage again; other stages can still read the checkpoint",
            )
        self.step, self.total = facts["step"], facts["counted"]
        self.patience.restore(facts["patience"])
        return facts["step"]

    def _read_end(self) -> dict[str, Any] | None:
        """The record of an earlier start that finished training; deleted if the checkpoint it chose is gone."""
        path = self.context.folder / ENDED
        try:
            ended = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:  # truncated by a power failure
            ended = {}
        if ended.get("best_step") in complete_steps(self.checkpoints):
            return ended
        path.unlink()
        return None

    def start(self, first_step: int, total_steps: int) -> None:
        """Open the metrics log and the progress line."""
        accelerator = get_accelerator()
        if accelerator.device_name() != "cpu":
            accelerator.reset_peak_memory_stats()
        distributed.on_main(lambda: self._open_log(first_step if self.ended is None else self.ended["step"]))
        if not distributed.is_main():
            return
        self.progress = Progress(self.stage.name, total_steps, first_step, columns=terminal_columns())
        parameters = f"{self.shape.parameters:,} parameters"
        tokens = f"{self._seen(total_steps)['tokens']:,} tokens"
        self.progress.note(f"{parameters}, {total_steps:,} steps, {tokens}")
        micro_batch = self.stage.micro_batch_on(distributed.world_size())
        if micro_batch != self.stage.micro_batch_sequences:
            share = self.stage.batch_sequences // distributed.world_size()
            self.progress.note(f"micro-batches of {micro_batch} sequences: a rank's share of the batch is {share}")
        if first_step:
            self.progress.note(f"resuming after step {first_step}")

    def _open_log(self, first_step: int) -> None:
        self.log = MetricsLog(
            self.context.folder,
            first_step,
            tensorboard=self.stage.tensorboard,
            wandb_project=self.stage.wandb_project,
            name=f"{self.context.recipe.name}/{self.stage.name}",
            config=self.stage.model_dump(mode="json"),
        )

    def events(self) -> Events:
        """The callbacks and periods for the training loop."""
        stage = self.stage
        return Events(
            log=self.write,
            evaluate=self.evaluate,
            save=self.save,
            writing=lambda: self.writer.writing,
            settle=self.writer.finish,
            log_every=stage.log_every_steps,
            evaluate_every=stage.evaluate_every_steps,
            save_every=stage.checkpoint_every_steps,
            save_evaluated=stage.patience is not None,
        )

    def write(self, step: int, record: dict[str, float]) -> None:
        """Write one record of training metrics."""
        steps, seconds = int(record.pop("steps")), record.pop("seconds")
        self.step, self.total = step, self.total + int(record.pop("tokens"))
        tokens = self._seen(step)["tokens"] - self._seen(step - steps)["tokens"]
        speed = tokens / max(seconds, 1e-9)
        self.last = {
            "step": step,
            **record,
            self.counted: self.total,
            **self._seen(step),
            "tokens_per_second": speed,
            "model_flops_per_second": speed * self.flops_per_token,
            "memory_bytes": int(distributed.all_reduce_max(_peak_memory_bytes())),
            **self.writer.take_times(),
        }
        if self.log is not None and self.progress is not None:
            self.log.write(self.last)
            facts: dict[str, str] = {name: f"{record[name]:.4f}" for name in PARTS if name in record}
            facts |= {"lr": f"{record['learning_rate']:.2e}", "norm": f"{record['gradient_norm']:.3f}"}
            self.progress.update(step, facts | {"tokens/s": f"{speed:,.0f}"})

    def evaluate(self, step: int) -> bool:
        """Evaluate the student on held-out blocks; returns whether the run should end here."""
        stage = self.stage
        with self.student.measured(lambda: self.watchdog.mark(f"step {step}: evaluating")) as view:
            found = self.measure(view, self.held_out, stage.evaluate_sequences, stage.micro_batch_sequences)
        self.evaluated = found
        self.patience.add(step, found["held_out_loss"])
        if self.log is not None and self.progress is not None:
            self.log.write({"step": step, **found})
            named = {name.removeprefix("held_out_"): value for name, value in found.items()}
            shown = ", ".join(f"{name} {named[name]:.4f}" for name in (*PARTS, "perplexity") if name in named)
            self.progress.note(f"step {step}: held-out {shown}")
            if self.patience.spent:
                best = f"step {self.patience.best_step}'s loss of {self.patience.best:.4f}"
                self.progress.note(f"ending after step {step}: {stage.patience} times no better than {best}")
        return self.patience.spent

    def catch_up(self, step: int, total_steps: int) -> bool:
        """Restore the evaluations of an earlier start that ended after `step` steps; returns whether to end here.

        If it ended between a checkpoint and its evaluation, that evaluation is done now.
        """
        every = self.stage.evaluate_every_steps
        if not step or not every:
            return False
        path = self.context.folder / "metrics.jsonl"
        last = distributed.broadcast_object(last_with(path, "held_out_loss") if distributed.is_main() else None)
        if last is not None:
            self.evaluated = {name: value for name, value in last.items() if name != "step"}
        if step % every and step != total_steps:
            return self.patience.spent
        if last is None or last["step"] != step:
            return self.evaluate(step)
        self.patience.add(step, last["held_out_loss"])  # the checkpoint was written before this loss was known
        return self.patience.spent

    def settle(self) -> None:
        """With patience, drop checkpoints after the best one, because readers of the stage use the newest."""
        best = self.patience.best_step if self.ended is None else self.ended["best_step"]
        if self.stage.patience is None or best is None:
            return
        with distributed.refused_together(), disk_full_named(self.context.folder):
            # Recorded before anything is dropped, so that a start after a kill here does not train those steps again.
            if self.ended is None and distributed.is_main():
                ended = {"step": self.step, "best_step": best, "metrics": self.metrics()}
                write_json(self.context.folder / ENDED, ended)
        drop_after(self.checkpoints, best)

    def save(self, step: int) -> None:
        """Start writing a checkpoint after `step` updates."""
        facts = {
            "step": step,
            "optimizer_steps": step,
            **self._seen(step),
            "counted": self.total,
            "patience": self.patience.state(),
            "record": self.last,  # of this step, as a log line precedes each checkpoint
            "ranks": distributed.world_size(),
            "config": self.student.config,
            "shapes": shapes(self.student),
            **self.facts,
        }
        spare = self.patience.best_step if self.stage.patience is not None else None
        self.watchdog.mark(f"step {step}: beginning a checkpoint")
        self.writer.begin(step, lambda: snapshot_shards(self.student), facts, spare)

    def _seen(self, step: int) -> dict[str, int]:
        """Sequences and tokens after `step` steps, without the masked ones that pad the last step."""
        length = self.store.sequence_length
        sequences = min(step * self.stage.batch_sequences, self.stage.total_sequences(length, len(self.store)))
        return {"sequences": sequences, "tokens": sequences * length}

    def metrics(self) -> dict[str, Any]:
        """The stage's metrics for the manifest."""
        if self.ended is not None:
            return self.ended["metrics"]
        path = self.context.folder / "metrics.jsonl"
        best = self.patience.best_step if self.stage.patience is not None else None
        last, evaluated = self.last, self.evaluated
        if best is not None:  # an earlier step may be the result
            last = read_marker(step_folder(self.checkpoints, best))["record"]
            evaluated = last_with(path, "held_out_loss", best) or {"held_out_loss": self.patience.best}
        elif not last:  # all steps were done in earlier starts
            last = last_with(path, "loss") or last
        kept = ("step", "sequences", "tokens", self.counted, "loss", *PARTS, "tokens_per_second", "memory_bytes")
        final = {name: last[name] for name in kept if name in last}
        found = {name: value for name, value in evaluated.items() if name != "step"}
        return {"parameters": self.shape.parameters, **final, **found}

    def close(self) -> None:
        """Close the metrics log and the progress line."""
        if self.log is not None:
            self.log.close()
        if self.progress is not None:
            self.progress.close()


def _peak_memory_bytes() -> int:
    """This rank's peak memory: of the accelerator, or of the process on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(accelerator.max_memory_allocated())
