"""The align stage, preference optimisation: a chat model learns which of two answers is better."""

from pathlib import Path
from typing import Any

from minima.data.store import TokenStore
from minima.engine.deepspeed_config import frozen_config
from minima.engine.layers import prepare_layers
from minima.engine.objectives.objective import Objective
from minima.engine.objectives.preference import Preference
from minima.engine.reference import HostReference, Reference
from minima.engine.student import StudentView
from minima.engine.teacher.host import FrozenHost
from minima.errors import VocabularyMismatch
from minima.evaluation.kept_reference import keep_references
from minima.evaluation.preference import evaluate_preference
from minima.models.shape import ModelShape
from minima.models.weights import model_identity
from minima.planning.placement import Choice
from minima.recipe.chat import Align
from minima.stages.context import StageContext
from minima.stages.origin import Origin, check_fit, check_format, check_template, check_tokens, open_origin
from minima.stages.training import run_training


def run(context: StageContext) -> dict[str, Any]:
    """Train the stage's model on preferences; returns the stage's metrics."""
    stage = context.stage
    assert isinstance(stage, Align)
    check_format(TokenStore.open(context.data(stage.data) / "train"), stage.kind)  # before any model is opened
    origin = open_origin(context, stage.reference or stage.model, stage.seed)
    shape = ModelShape.from_config(origin.source.config)
    references = _References(context, stage, origin)

    def objective(data: Path, student: ModelShape, _: Choice) -> Objective:
        if origin.tokenizer is None and student.vocabulary_size != shape.vocabulary_size:
            raise VocabularyMismatch(
                f"the reference {origin.identity} has no tokenizer and {shape.vocabulary_size:,} vocabulary rows, but "
                f"the model has {student.vocabulary_size:,}",
                "both assign probabilities to the same answers, so both must use the same tokens",
                "choose a reference with a tokenizer, or omit `reference` to use the starting weights",
            )
        for part in ("train", "held_out"):
            check_fit(shape, TokenStore.open(data / part), origin.identity)
        check_tokens(data, origin.tokenizer, origin.identity)
        for model in filter(None, (stage.model, stage.reference)):
            check_template(context, data, model, refuse=True)
        references.open(data)
        return _objective(stage, references.train)

    def measure(
        view: StudentView, store: TokenStore, sequences: int | None, micro_batch_sequences: int
    ) -> dict[str, float]:
        scores = evaluate_preference(
            view,
            store,
            _objective(stage, references.held_out),
            sequences=sequences,
            micro_batch_sequences=micro_batch_sequences,
            name=stage.name,
        )
        return {f"held_out_{name}": value for name, value in scores.as_dict().items()}

    try:
        return run_training(
            context,
            stage,
            objective,
            {"reference": origin.identity},
            measure=measure,
            counted="pairs",
            teacher_shape=None if stage.precompute_reference else shape,
        )
    finally:
        references.close()


def _objective(stage: Align, reference: Reference) -> Preference:
    normalised = stage.length_normalised
    return Preference(
        reference,
        loss=stage.loss,
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        length_normalised=stage.loss == "ipo" if normalised is None else normalised,
        chunk_tokens=stage.chunk_tokens,
    )


class _References:
    """The stage's frozen reference, for the training blocks and for the held-out blocks."""

    train: Reference
    held_out: Reference

    def __init__(self, context: StageContext, stage: Align, origin: Origin) -> None:
        self.context, self.stage, self.origin = context, stage, origin
        self._host: FrozenHost | None = None

    def open(self, data: Path) -> None:
        """Build the frozen model, or read its stored outputs; every rank calls it, before the student is built."""
        stage = self.stage
        if not stage.precompute_reference:
            self._host = self._build()
            self.train = self.held_out = HostReference(self._host, stage.chunk_tokens)
            return
        limits = {"train": None} | ({"held_out": stage.evaluate_sequences} if stage.evaluate_every_steps else {})
        kept = keep_references(
            self.context.run_folder / "cache",
            [TokenStore.open(data / split) for split in limits],
            self._build,
            model=model_identity(self.origin.source),
            precision=self._precision,
            micro_batch_sequences=stage.micro_batch_sequences,
            chunk_tokens=stage.chunk_tokens,
            limits=list(limits.values()),
            name=stage.name,
        )
        self.train, self.held_out = kept[0], kept[-1]

    @property
    def _precision(self) -> str:
        return self.stage.reference_precision or self.stage.precision

    def _build(self) -> FrozenHost:
        config = frozen_config(
            self.context.deepspeed_json(self.stage.reference_deepspeed),
            precision=self._precision,
            micro_batch_sequences=self.stage.micro_batch_sequences,
        )
        return FrozenHost(
            self.origin.source,
            config,
            precision=self._precision,
            layers=lambda model: prepare_layers(model, compiled=self.stage.compile, kernels=self.stage.kernels),
        )

    def close(self) -> None:
        """Free the frozen model's memory, if it is still loaded."""
        if self._host is not None:
            self._host.close()
