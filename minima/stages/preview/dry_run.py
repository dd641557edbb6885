"""The dry run: shapes, tokens and steps of every stage, from the recipe and the files on this machine. No torch."""

from contextlib import suppress
from pathlib import Path

from minima.errors import MinimaError, RecipeError, StageError, stage_named
from minima.evaluation.task_names import unknown_tasks
from minima.models.shape import ModelShape
from minima.planning.arithmetic import check_batch, checkpoint_bytes, describe_shape, training_flops
from minima.planning.candidates import trained_stage
from minima.planning.dry_run import StagePreview, render, training_facts
from minima.planning.placement import unchosen
from minima.planning.units import flops_text, size_text
from minima.pruning.target import check_norm_compensation, plan_target
from minima.recipe.loading import resolved_yaml
from minima.recipe.overrides import nearest
from minima.recipe.references import deepspeed_jsons, named_steps, references, sources, trained_precision, unread
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
    ModelInput,
    Prune,
    Publish,
    Recipe,
)
from minima.stages.digests import is_gone
from minima.stages.identity import changed_settings, made_from, read_and_changed
from minima.stages.manifest import FINISHED, STARTED, is_finished, read_manifest
from minima.stages.preview.known_fit import (
    check_known_format,
    check_known_scores,
    check_models,
    check_positions,
    measures,
)
from minima.stages.preview.known_inputs import KnownInputs
from minima.stages.preview.known_tokens import check_known_tokens, check_rows, check_trained_tokenizer, with_shared_rows
from minima.stages.run_folder import check_run_folder
from minima.stages.shipped import check_deepspeed_json

_LEAVES = {
    "build_data": "tokenizer, train and held-out blocks",
    "expand_vocabulary": "a model with more tokens, and its tokenizer",
    "adapt": "checkpoints and metrics",
    "distil": "checkpoints and metrics",
    "instruct": "checkpoints and metrics",
    "align": "checkpoints and metrics",
    "prune": "model and scores",
    "evaluate": "evaluation.json",
    "export": "a model that plain transformers loads",
    "benchmark": "benchmark.json and answer files",
    "publish": "a record of the push, in manifest.json",
}


class Walk(KnownInputs):
    """Walks the stages in order and remembers what each would provide for the later ones."""

    def stage(self, stage: AnyStage) -> StagePreview:
        own = self.folder / stage.name
        state = "not begun"
        if (own / FINISHED).is_file() or (own / STARTED).is_file():
            state = "finished" if is_finished(own) else "half-finished"
        preview = StagePreview(stage.name, stage.kind, state, writes=f"{own}: {_LEAVES[stage.kind]}")
        with suppress(StageError):  # an unreadable manifest is an error only for commands that need it
            if changed := changed_settings(stage, own):
                again = f"remove {own} to make it again{made_from(self.recipe, stage.name, self.folder)}"
                preview.refused.append(f"{'; '.join(changed)}; {again}")
        preview.notes += [f"not used: {setting}" for setting in unread(self.recipe, stage)]
        for reference in references(self.recipe, stage):
            preview.reads.append(self.reads(reference, preview))
        for name in deepspeed_jsons(stage) if state != "finished" else ():
            try:
                check_deepspeed_json(stage, name, self.recipe_path)
            except MinimaError as error:
                preview.refused.append(error.what)
        check_known_tokens(self.recipe, stage, self.folder)
        check_known_format(self, stage)
        self._sources(stage, preview)
        if isinstance(stage, BuildData):
            self._build_data(stage, preview)
        elif isinstance(stage, ExpandVocabulary):
            self._expand(stage, preview)
        elif isinstance(stage, Prune):
            self._prune(stage, preview)
        elif isinstance(stage, AnyTraining):
            self._training(stage, preview)
        elif isinstance(stage, Evaluate):
            self._check_held_out(stage, "evaluates", "let the stage read other data, or remove the stage")
            for model in filter(None, (*stage.models, stage.teacher)):
                check_positions(self, stage.name, stage.data, self.structure(ModelInput(source=model)), part="held_out")
        elif isinstance(stage, Export):
            self._export(stage, preview)
        elif isinstance(stage, Benchmark):
            self._benchmark(stage, preview)
        elif isinstance(stage, Publish):
            preview.facts.append(("to", f"{stage.repo}, {'private' if stage.private else 'public'} if it is new"))
        return preview

    def _sources(self, stage: AnyStage, preview: StagePreview) -> None:
        for _, source in sources(stage):
            preview.reads.append(f"source {source.label}" + (f", weight {source.weight:g}" if source.weight else ""))
            if is_gone(source):
                preview.missing.append(f"{source.path} (source {source.label}) is not on this machine")

    def _build_data(self, stage: BuildData, preview: StagePreview) -> None:
        template = stage.chat_template
        if template not in (None, "minichat", "own") and not Path(template).expanduser().is_file():
            preview.missing.append(f"the chat_template {template} is not on this machine")
        blocks = self.blocks(stage.name)
        if blocks is None:
            mixed = len(stage.sources) > 1 and any(source.weight is not None for source in stage.sources)
            read = "until each source has been read once, others again by weight" if mixed else "every token once"
            preview.facts.append(("tokens", f"{read}, in blocks of {stage.sequence_length:,}"))
            return
        total = stage.tokens or blocks * stage.sequence_length
        left = total - blocks * stage.sequence_length
        line = f"{total:,} in {blocks:,} blocks of {stage.sequence_length:,}"
        preview.facts.append(("tokens", line + (f"; the last {left:,} do not fill a block" if left else "")))
        tokens = blocks * stage.sequence_length + (stage.held_out_tokens or 0)
        learnt_bytes = stage.format != "text"  # chat needs one more byte per token: whether it is to be learnt
        preview.facts.append(("disk", size_text(tokens * (self.token_bytes(stage) + learnt_bytes))))

    def _export(self, stage: Export, preview: StagePreview) -> None:
        found = self.shape(ModelInput(source=stage.model)) or self.made(stage.name)
        if found is None:
            return
        self.shapes[stage.name] = found
        preview.facts.append(("model", describe_shape(found)))
        dtype = stage.dtype or trained_precision(self.recipe, stage.model)
        preview.facts.append(("disk", _model_size(found, dtype)))

    def _expand(self, stage: ExpandVocabulary, preview: StagePreview) -> None:
        shape, grown = self.shape(stage.model), self.made(stage.name)
        if shape is not None:
            preview.facts.append(("from", describe_shape(shape)))
            if grown is None and stage.size is not None:
                grown = shape.model_copy(update={"vocabulary_size": stage.size})
        if grown is None:
            self._remember(stage.name, self.structure(stage.model))
            preview.notes.append("the extended vocabulary's size is unknown until the stage has run")
            return
        self.shapes[stage.name] = grown
        preview.facts.append(("to", describe_shape(grown)))
        preview.facts.append(("disk", _model_size(grown, None)))

    def _benchmark(self, stage: Benchmark, preview: StagePreview) -> None:
        suite = ["the paper's six (humaneval only with --allow-code-execution)"] if stage.suite else []
        tasks = [*suite, *stage.tasks, *(answers.format for answers in stage.answers)]
        preview.facts.append(("tasks", ", ".join(tasks) + (f", {stage.limit:,} items each" if stage.limit else "")))
        for folder in (stage.data_folder, stage.task_folder, *(answers.questions for answers in stage.answers)):
            if folder is not None and not Path(folder).expanduser().exists():
                preview.missing.append(f"{folder} is not on this machine")
        own = None if stage.task_folder is None else Path(stage.task_folder).expanduser()
        for task, known in unknown_tasks(stage.tasks, own).items() if stage.tasks else ():
            preview.missing.append(f"no task file on this machine defines {task!r}{nearest(task, known)}")

    def _prune(self, stage: Prune, preview: StagePreview) -> None:
        shape, known, pruned = self.shape(stage.model), self.structure(stage.model), self.made(stage.name)
        check_known_scores(self.recipe, stage, self.length(stage.data))
        if stage.data is not None and measures(stage):
            check_positions(self, stage.name, stage.data, known, stage.sequence_length)
        if known is not None:
            left = plan_target(known, stage.target, selection=stage.selection).student
            check_norm_compensation(known, stage.norm_compensation)
            self._remember(stage.name, left)
            pruned = left if shape is not None else pruned
        if shape is not None:
            preview.facts.append(("from", describe_shape(shape)))
        if pruned is None:
            preview.notes.append("the model's shape is unknown on this machine, and so is the pruned one's")
            return
        self.shapes[stage.name] = pruned
        preview.facts.append(("to", describe_shape(pruned)))
        if shape is not None:
            widest = "at most " if stage.selection == "global" else ""  # padded to the widest layer, which is unknown
            share = f"{widest}{pruned.parameters / shape.parameters:.4f} of the parameters are kept"
            preview.facts.append(("share", f"{share}; {pruned.num_layers} of {shape.num_layers} layers"))
        preview.facts.append(("disk", _model_size(pruned, None)))
        if measures(stage):
            length = stage.sequence_length or self.length(stage.data)
            tokens = f", {stage.sequences * length:,} tokens" if length else ""
            preview.facts.append(("importance", f"{stage.sequences:,} sequences{tokens}"))

    def _training(self, stage: AnyTraining, preview: StagePreview) -> None:
        check_batch(stage.name, stage, self.ranks)
        shape, frozen = self.shape(stage.model) or self.made(stage.name), stage.frozen_model
        teacher = self.shape(frozen) if frozen is not None else None
        if shape is not None and teacher is not None and isinstance(stage, Distil):
            note = check_rows(self.recipe, stage, shape, teacher)
            preview.notes += [note] if note is not None else []
            shape, teacher = with_shared_rows(shape, teacher)
        if shape is None:
            self._remember(stage.name, self.structure(stage.model))
            preview.notes.append(
                "the model's config.json is not on this machine, and the recipe has no `shape:` for it"
            )
        else:
            self.shapes[stage.name] = shape
            preview.facts.append(("student" if isinstance(stage, Distil) else "model", describe_shape(shape)))
        if teacher is not None:
            who = "teacher" if isinstance(stage, Distil) else "reference"
            preview.facts.append((who, describe_shape(teacher)))
            check_trained_tokenizer(self.recipe, stage.name, stage.data, teacher, who)
        blocks = self.blocks(stage.data)
        plan = self.training_plan(stage)
        if shape is not None:
            check_trained_tokenizer(self.recipe, stage.name, stage.data, shape)
        if stage.evaluate_every_steps:
            self._check_held_out(stage, "evaluates while it trains", "or set evaluate_every_steps: 0")
        preview.unplaced = check_models(self, stage)
        named = named_steps(self.recipe, stage.name)
        disk = checkpoint_bytes(stage, shape.parameters, plan.steps if plan else None, named) if shape else None
        if disk is not None:
            preview.facts.append(("disk", f"{size_text(disk)} of checkpoints, at most"))
        if plan is None:
            preview.notes.append("tokens and steps are unknown until the data is built")
            return
        preview.facts += training_facts(plan, self.ranks, stage.micro_batch_on(self.ranks))
        if shape is None or (frozen is not None and teacher is None):
            return
        if isinstance(stage, Distil):
            self._memory(stage, preview, shape, teacher, plan.sequence_length)
        if isinstance(stage, Align) and stage.precompute_reference:
            flops = training_flops(plan, shape, teacher, blocks or 0)
            late = "" if blocks is not None else "; plus one pass of the reference over the data, once it is built"
            preview.facts.append(("FLOPs", flops_text(flops) + late))
            return
        preview.facts.append(("FLOPs", flops_text(training_flops(plan, shape, teacher))))

    def _remember(self, name: str, structure: ModelShape | None) -> None:
        if structure is not None:
            self.structures[name] = structure

    def _memory(
        self, stage: Distil, preview: StagePreview, student: ModelShape, teacher: ModelShape | None, length: int
    ) -> None:
        try:
            preview.memory = unchosen(trained_stage(stage, student, teacher, length, self.sharding), self.ranks)
        except RecipeError as error:
            preview.notes += [error.what] if error.what not in preview.notes else []

    def _check_held_out(self, stage: AnyTraining | Evaluate, how: str, do: str) -> None:
        data = self.data_stage(stage.data)
        none = "held_out_fraction 0" if data is not None and not data.held_out_fraction else None
        if is_finished(folder := self._data_folder(stage.data)) and not is_finished(self.folder / stage.name):
            metrics = read_manifest(folder).get("metrics") or {}
            none = none or ("no held-out block" if metrics.get("held_out_blocks", 1) == 0 else None)
        if none is not None:
            raise RecipeError(
                f"stages.{stage.name}: it {how}, but the data {stage.data!r} has {none}",
                "there would be no text that the model was not trained on",
                f"give the build_data stage a held_out_fraction above 0, {do}",
            )


def walk(recipe: Recipe, recipe_path: Path) -> list[StagePreview]:
    """Preview every stage, without running any.

    Raises:
        MinimaError: the recipe asks for an impossible shape, length or batch; names the stage.
    """
    previews, state = [], Walk(recipe, recipe_path)
    for stage in recipe.stages:
        with stage_named(stage.name):
            previews.append(state.stage(stage))
    return previews


def dry_run_text(recipe: Recipe, recipe_path: Path, stages: list[AnyStage]) -> str:
    """The text of `minima run --dry-run`.

    Args:
        recipe: the whole run; stages that are not shown are still walked, for their shapes.

    Raises:
        StageError: the run's folder belongs to another recipe, or cannot be used as one.
        MinimaError: as `walk` does.
    """
    check_run_folder(recipe.folder, recipe)
    shown, previews = {stage.name for stage in stages}, walk(recipe, recipe_path)
    refused = read_and_changed(recipe, stages, recipe.folder)
    return render(resolved_yaml(recipe), [found for found in previews if found.name in shown | refused.keys()])


def _model_size(shape: ModelShape, dtype: str | None) -> str:
    """Size of a model's file as text; without a given dtype, an upper bound for float32."""
    if dtype is None:
        return f"{size_text(4 * shape.parameters)} at most"
    return f"{size_text((4 if dtype == 'float32' else 2) * shape.parameters)} in {dtype}"
