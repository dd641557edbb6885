"""The distil stage: a student learns from text and from a frozen teacher."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from minima.data.store import TokenStore
from minima.engine.deepspeed_config import frozen_config
from minima.engine.layers import prepare_layers
from minima.engine.objectives.distillation import Distillation
from minima.engine.objectives.objective import Objective
from minima.engine.teacher.host import FrozenHost
from minima.models.shape import ModelShape
from minima.models.weights import WeightSource
from minima.planning.placement import Choice
from minima.recipe.base import ModelInput
from minima.recipe.distillation import Distil, Teacher
from minima.stages.context import StageContext
from minima.stages.digests import digest
from minima.stages.hub import kept_commit
from minima.stages.manifest import STARTED, read_manifest
from minima.stages.origin import check_fit, check_template, check_tokens, open_origin
from minima.stages.training import run_training
from minima.stages.vocabularies import cut, shared_rows


def run(context: StageContext) -> dict[str, Any]:
    """Train the stage's student; returns the stage's metrics."""
    stage = context.stage
    assert isinstance(stage, Distil)
    if not stage.soft_weight:  # the teacher's output would not be used

        def alone(data: Path, student: ModelShape, _: Choice) -> Objective:
            check_template(context, data, stage.model, refuse=False)
            return Distillation(None, hard_weight=stage.hard_weight, soft_weight=0, chunk_tokens=stage.chunk_tokens)

        return run_training(context, stage, alone)
    student, teacher = (open_origin(context, model, stage.seed) for model in (stage.model, stage.teacher))
    rows = shared_rows(student, teacher)
    student, teacher = cut(student, rows), cut(teacher, rows)
    shape = ModelShape.from_config(teacher.source.config)
    opened = ExitStack()

    def objective(data: Path, _student: ModelShape, choice: Choice) -> Objective:
        check_fit(shape, TokenStore.open(data / "train"), teacher.identity)
        check_tokens(data, teacher.tokenizer, teacher.identity)
        check_template(context, data, stage.teacher, refuse=True)
        check_template(context, data, stage.model, refuse=False)  # the student may be learning the teacher's format
        documents = TokenStore.open(data / "train").document_mask
        host = opened.enter_context(closing(_host(context, stage, teacher.source, choice, documents)))
        return Distillation(
            host,
            hard_weight=stage.hard_weight,
            soft_weight=stage.soft_weight,
            temperature=stage.temperature,
            chunk_tokens=stage.chunk_tokens,
            window=choice.window_micro_batches,
            **stage.soft_options(),
        )

    facts = _teacher_facts(context, stage.teacher, teacher.identity)
    with opened:
        return run_training(context, stage, objective, facts, teacher_shape=shape, origin=student)


def _teacher_facts(context: StageContext, teacher: ModelInput, identity: str) -> dict[str, Any]:
    """What checkpoints record about the teacher: its name, its hash from `started.json`, and its commit on the Hub.

    Other ranks return the name only: rank 0's facts are recorded, and another node may not see these files yet. Random
    weights have only a name.
    """
    facts = {"teacher": identity}
    if teacher.source is None or context.launch.rank:
        return facts
    started = read_manifest(context.folder, STARTED) if (context.folder / STARTED).is_file() else {}
    found = {
        "teacher_hash": started.get("inputs", {}).get(f"teacher ({teacher.source})"),
        "teacher_revision": kept_commit(teacher.source, teacher.revision, context.run_folder),
    }
    return facts | {name: value for name, value in found.items() if value is not None}


def _host(context: StageContext, stage: Distil, source: WeightSource, choice: Choice, documents: bool) -> FrozenHost:
    """Build the teacher with the placement that the memory plan chose."""
    assert choice.placement is not None
    precision = stage.teacher.precision or stage.precision
    nvme = None
    if choice.offload == "nvme":
        assert stage.teacher.nvme_path is not None, "refused by the recipe"
        own = digest(str(context.folder.absolute()))[:12]  # a folder for this stage alone, because DeepSpeed empties it
        nvme = Path(stage.teacher.nvme_path).expanduser() / f"minima-{own}"
    config = frozen_config(
        context.deepspeed_json(stage.teacher.deepspeed or Teacher.shipped_json(choice.placement, choice.offload)),
        precision=precision,
        micro_batch_sequences=stage.micro_batch_sequences,
        placement=choice.placement,
        offload=choice.offload,
        nvme_path=nvme,
        tensor_parallel_ranks=choice.tensor_parallel_ranks or 1,
    )
    return FrozenHost(
        source,
        config,
        precision=precision,
        placement=choice.placement,
        windows=choice.window_micro_batches > 1,
        documents=documents,
        layers=lambda model: prepare_layers(model, compiled=stage.compile, kernels=stage.kernels),
    )
