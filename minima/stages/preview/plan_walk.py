"""What each stage of a recipe needs on given GPUs, which need not exist; extends the dry run's walk. No torch."""

from pathlib import Path

from minima.errors import stage_named
from minima.models.shape import ModelShape
from minima.planning.arithmetic import (
    CHECKPOINT_BYTES,
    checkpoint_bytes,
    model_flops_per_token,
    plan_training,
    training_flops,
)
from minima.planning.candidates import trained_stage
from minima.planning.dry_run import training_facts
from minima.planning.memory import Memory, Work, frozen_memory, scored_memory
from minima.planning.run_plan import PlannedGpus, StagePlan
from minima.planning.stage_plan import frozen, place
from minima.recipe.base import ModelInput
from minima.recipe.references import deepspeed_jsons, named_steps, stage_and_step
from minima.recipe.schema import (
    Align,
    AnyStage,
    AnyTraining,
    Benchmark,
    BuildData,
    Distil,
    Evaluate,
    ExpandVocabulary,
    Export,
    Prune,
    Publish,
    Recipe,
)
from minima.stages.preview.dry_run import Walk
from minima.stages.preview.known_tokens import check_rows, with_shared_rows
from minima.stages.shipped import check_deepspeed_json


class _Planner(Walk):
    """The dry run's walk over the stages, for the GPUs that the run is planned for."""

    def __init__(self, recipe: Recipe, recipe_path: Path, gpus: PlannedGpus) -> None:
        super().__init__(recipe, recipe_path)
        self.ranks, self.gpus = gpus.count, gpus
        self.unknown: dict[str, str] = {}  # by stage: the root of its model, if that root's shape is unknown
        self.told: set[str] = set()  # roots for which a note has said what to do

    def plan(self, stage: AnyStage) -> StagePlan:
        for name in deepspeed_jsons(stage):
            check_deepspeed_json(stage, name, self.recipe_path)
        self.stage(stage)  # checks the stage and stores its shape
        plan = StagePlan(
            stage.name, stage.kind, idle=isinstance(stage, BuildData | ExpandVocabulary | Export | Publish)
        )
        if isinstance(stage, BuildData):
            self._data(stage, plan)
        elif isinstance(stage, AnyTraining):
            self._trained(stage, plan)
        elif isinstance(stage, Prune):
            self._pruned(stage, plan)
        elif isinstance(stage, Evaluate):
            self._evaluated(stage, plan)
        elif isinstance(stage, ExpandVocabulary | Export):
            if isinstance(stage, ExpandVocabulary):
                before = self._known(stage.name, stage.model, plan, "model")
            else:
                before = self._known(stage.name, ModelInput(source=stage.model), plan)
            shape = self.shapes.get(stage.name)
            if shape is not None:
                size = 2 if isinstance(stage, Export) and stage.dtype not in (None, "float32") else 4
                plan.parameters, plan.disk = shape.parameters, {"model": size * shape.parameters}
            elif before is not None:
                plan.notes.append("the extended vocabulary's size is unknown until the stage has run; or set `size:`")
                self.unknown[stage.name] = stage.name
        elif isinstance(stage, Benchmark):
            plan.notes.append("its time depends on the lengths of the generated answers, which are unknown")
        return plan

    def _known(self, name: str, model: ModelInput, plan: StagePlan, key: str = "") -> ModelShape | None:
        """The model's shape; None, with a note that says what to do, if it is unknown.

        Args:
            name: of the stage.
            model: the model that it reads.
            plan: of the stage; receives the note.
            key: the recipe's key for this model, if it accepts a `shape:`.
        """
        shape = self.shape(model)
        if shape is not None:
            return shape
        source = model.source or ""
        made_by, _ = stage_and_step(self.recipe, source)
        root = source if made_by is None else self.unknown.get(made_by.name, source)
        self.unknown[name] = root
        note = f"the shape of {root} is unknown on this machine, so this stage is not fully counted"
        if root not in self.told and root == source:
            self.told.add(root)
            add = (
                f"write `{key}: {{source: {root}, shape: {{...}}}}` in stages.{name}, with the values of its "
                "config.json, "
            )
            note += f": {add + 'or ' if key else ''}run `minima fetch {self.recipe_path}` if it is on the Hub"
        if not any(root in other for other in plan.notes):
            plan.notes.append(note)
        return None

    def _data(self, stage: BuildData, plan: StagePlan) -> None:
        blocks = self.blocks(stage.name)
        if blocks is None:
            plan.notes.append("its tokens are unknown until it is built; or set `tokens:`")
            return
        plan.tokens = blocks * stage.sequence_length
        tokens = plan.tokens + (stage.held_out_tokens or 0)
        plan.disk = {"data": tokens * (self.token_bytes(stage) + (stage.format != "text"))}

    def _trained(self, stage: AnyTraining, plan: StagePlan) -> None:
        shape = self._known(stage.name, stage.model, plan, "model")
        model = stage.frozen_model
        key = "teacher" if isinstance(stage, Distil) else "reference"
        other = self._known(stage.name, model, plan, key) if model is not None else None
        if shape is not None and other is not None and isinstance(stage, Distil):
            note = check_rows(self.recipe, stage, shape, other)
            plan.notes += [note] if note is not None else []
            shape, other = with_shared_rows(shape, other)
        length, blocks = self.length(stage.data), self.blocks(stage.data)
        training = plan_training(stage, length, blocks) if length else None
        if training is not None:
            plan.tokens, plan.steps = training.tokens, training.steps
            facts = dict(training_facts(training, self.ranks, stage.micro_batch_on(self.ranks)))
            plan.batch = facts["batch"].replace("ranks", "GPUs")
        else:
            plan.notes.append(f"its tokens and steps are unknown until {stage.data} is built")
        if other is not None:
            plan.frozen_parameters = other.parameters
        if shape is None:
            return
        plan.parameters = shape.parameters
        disk = checkpoint_bytes(stage, shape.parameters, plan.steps, named_steps(self.recipe, stage.name))
        plan.disk = {} if disk is None else {"checkpoints, at most": disk}
        plan.disk["one checkpoint"] = CHECKPOINT_BYTES * shape.parameters
        if length is None or (model is not None and other is None):
            return
        plan.flops_per_token = model_flops_per_token(shape, other, length)
        once = isinstance(stage, Align) and stage.precompute_reference
        if training is not None:
            plan.flops = training_flops(training, shape, other, (blocks or 0) if once else None)
        if once:
            plan.notes.append("the reference's single pass over the data counts in the FLOPs, not in the time")
            plan.flops_per_token, other = model_flops_per_token(shape, None, length), None
        place(plan, trained_stage(stage, shape, other, length, self.sharding), self.gpus)

    def _pruned(self, stage: Prune, plan: StagePlan) -> None:
        shape, pruned = self._known(stage.name, stage.model, plan, "model"), self.shapes.get(stage.name)
        if pruned is not None:
            plan.parameters, plan.disk = pruned.parameters, {"model": 4 * pruned.parameters}
        length = stage.sequence_length or self.length(stage.data)
        plan.idle = stage.score != "gradient" or stage.scores is not None
        if shape is None or plan.idle or length is None:
            return
        plan.frozen_parameters, plan.tokens = shape.parameters, stage.sequences * length
        forward = shape.forward_flops_per_token(length)
        # Weights get no gradients, so backward costs as much as forward; recomputing the layers costs another forward.
        plan.flops_per_token, plan.executed_flops_per_token = 2 * forward, 3 * forward
        plan.flops = 2 * forward * plan.tokens
        work = Work(stage.micro_batch_sequences, length)
        memory = scored_memory(shape, stage.precision, work, self.ranks, self.sharding(stage.deepspeed))
        turns = -(-stage.sequences // (stage.micro_batch_sequences * self.ranks))  # micro-batches of one rank
        rank_flops = 3 * forward * turns * work.tokens
        frozen(plan, [memory], stage.precision, self.gpus, rank_flops)

    def _evaluated(self, stage: Evaluate, plan: StagePlan) -> None:
        names = [*stage.models, *([stage.teacher] if stage.teacher else [])]
        shapes = [self._known(stage.name, ModelInput(source=name), plan) for name in dict.fromkeys(names)]
        known = dict(zip(dict.fromkeys(names), shapes, strict=True))
        data, length = self.data_stage(stage.data), self.length(stage.data)
        kept = data.held_out_tokens // data.sequence_length if data and data.held_out_tokens else None
        sequences = [count for count in (stage.sequences, kept) if count is not None]
        if not sequences or length is None:
            plan.notes.append("how much it reads is unknown until its data is built; or set `sequences:`")
            return
        plan.tokens = min(sequences) * length
        found = {name: shape for name, shape in known.items() if shape is not None}
        if len(found) < len(known):
            return
        teacher = found[stage.teacher] if stage.teacher else None
        forward = {name: shape.forward_flops_per_token(length) for name, shape in found.items()}
        beside = forward[stage.teacher] if stage.teacher else 0.0
        plan.flops_per_token = sum(forward[name] + beside for name in stage.models)
        plan.flops = plan.flops_per_token * plan.tokens
        work = Work(stage.micro_batch_sequences, length)
        largest = max((found[name] for name in stage.models), key=lambda shape: shape.parameters)
        models = [largest, *([teacher] if teacher is not None else [])]
        memories = [self._sharded(shape, stage.precision, work, stage.deepspeed) for shape in models]
        rank_flops = plan.flops_per_token * -(-min(sequences) // self.ranks) * length
        frozen(plan, memories, stage.precision, self.gpus, rank_flops)

    def _sharded(self, shape: ModelShape, precision: str, work: Work, json_name: str) -> Memory:
        return frozen_memory(shape, precision, "zero3", "none", work, self.ranks, self.sharding(json_name))


def plan_run(recipe: Recipe, recipe_path: Path, gpus: PlannedGpus) -> list[StagePlan]:
    """The plan of every stage.

    Raises:
        MinimaError: the recipe asks for an impossible shape, length or batch; names the stage.
    """
    planner, plans = _Planner(recipe, recipe_path, gpus), []
    for stage in recipe.stages:
        with stage_named(stage.name):
            plans.append(planner.plan(stage))
    return plans
