"""What this machine's configurations and manifests tell about a recipe's inputs. No torch."""

import json
from pathlib import Path

from pydantic import ValidationError

from minima.errors import MinimaError, RecipeError
from minima.launcher import default_ranks
from minima.models.layout import MARKER, complete_steps, step_folder
from minima.models.shape import ModelShape
from minima.planning.arithmetic import TrainingPlan, check_length, plan_training
from minima.planning.dry_run import StagePreview
from minima.planning.sharding import Sharding, read_sharding
from minima.recipe.data import TokenizerTraining
from minima.recipe.overrides import nearest
from minima.recipe.references import Reference, stage_and_step
from minima.recipe.schema import AnyTraining, BuildData, ModelInput, Recipe
from minima.stages.manifest import is_finished, read_manifest
from minima.stages.shipped import find_deepspeed_json


def planned_ranks(recipe: Recipe) -> int:
    """The number of ranks that `minima run` starts for a stage on this machine."""
    return recipe.ranks or (1 if recipe.launcher == "local" else default_ranks(recipe.max_ranks))


class KnownInputs:
    """Shapes, lengths and blocks of a recipe's stages, as far as they are known; stores shapes and steps."""

    def __init__(self, recipe: Recipe, recipe_path: Path) -> None:
        self.recipe, self.recipe_path, self.folder = recipe, recipe_path, recipe.folder
        self.ranks = planned_ranks(recipe)
        self.shapes: dict[str, ModelShape] = {}
        self.structures: dict[str, ModelShape] = {}  # of models whose vocabulary is not known before a stage has run
        inputs = [value for stage in self.recipe.stages for _, value in stage if isinstance(value, ModelInput)]
        self._given = {model.source: model.shape for model in inputs if model.source and model.shape}
        self.steps: dict[str, int] = {}

    def reads(self, reference: Reference, preview: StagePreview) -> str:
        """Describe one input in a line; adds to the preview's notes what is missing.

        Raises:
            RecipeError: the input does not exist and looks like a misspelt stage, or is a step that is never saved.
        """
        if reference.stage is not None:
            self._check_step(reference, preview)
            return f"{reference.field}: {self.folder / reference.stage}" + (
                f" after step {reference.step:,}" if reference.step is not None else ""
            )
        path = Path(reference.text).expanduser()
        if not path.exists():
            of_hub = reference.what in ("model", "tokenizer") or self.recipe.stage(preview.name).kind == "benchmark"
            if of_hub and cached_config(reference.text, reference.revision):
                return f"{reference.field}: {reference.text} from the Hub's cache"
            self._refuse_misspelt(reference, preview.name)
            preview.missing.append(f"{reference.text} ({reference.field}) is not on this machine")
        return f"{reference.field}: {reference.text}"

    def _check_step(self, reference: Reference, preview: StagePreview) -> None:
        if reference.step is None or reference.stage is None or preview.state == "finished":
            return
        trained, last = self.recipe.stage(reference.stage), self.steps.get(reference.stage)
        assert isinstance(trained, AnyTraining), "refused by the recipe"
        if trained.patience is not None:
            preview.notes.append(f"{reference.text} will exist only if {reference.stage}'s best step is not earlier")
        if reference.step in complete_steps(self.folder / reference.stage / "checkpoints"):  # saved after a signal
            return
        periods = [trained.checkpoint_every_steps]
        periods += [trained.evaluate_every_steps] if trained.patience is not None else []
        saved = reference.step > 0 and any(reference.step % period == 0 for period in periods)
        if last is not None and reference.step > last:
            but = f"that stage ends with step {last:,}"
        elif not saved and reference.step != last and (last is not None or not reference.step):
            often = " and every ".join(f"{period:,}" for period in periods)
            but = f"that stage saves every {often} steps and at its end"
        else:
            return
        raise RecipeError(
            f"stages.{preview.name}.{reference.field}: {reference.text!r}, but {but}",
            "there would be no such checkpoint to read",
            f"name a step that is saved, or write {reference.stage!r} for the last one",
        )

    def _refuse_misspelt(self, reference: Reference, stage: str) -> None:
        own = [each.name for each in self.recipe.stages if each.name != stage]
        hub = reference.what in ("model", "tokenizer", "exported")  # old Hub ids have no owner: gpt2, distilgpt2
        close = nearest(reference.text.partition("@")[0], own, 0.85 if hub and "@" not in reference.text else 0.6)
        if close and "/" not in reference.text and not is_finished(self.folder / stage):
            raise RecipeError(
                f"stages.{stage}.{reference.field}: {reference.text!r} is neither a stage of this recipe nor a folder "
                f"on this machine{close}",
                "it would be looked up on the Hub, after all the stages before it have run",
                f"write the stage's name, or a folder as ./{reference.text}, or the full OWNER/NAME of a Hub id",
            )

    def token_bytes(self, stage: BuildData) -> int:
        """Bytes per token for the stage's vocabulary, or 2, the most common, if the vocabulary is unknown."""
        if isinstance(stage.tokenizer, TokenizerTraining):
            return _bytes_of_a_token(stage.tokenizer.vocabulary_size)
        if (data := self.data_stage(stage.tokenizer)) is not None:
            return self.token_bytes(data)
        try:
            shape = self.shape(ModelInput(source=stage.tokenizer))
        except MinimaError:  # a tokenizer's folder need not contain a supported model
            shape = None
        return _bytes_of_a_token(shape.vocabulary_size if shape is not None else 0)

    def shape(self, model: ModelInput) -> ModelShape | None:
        """A model's shape; None if it is unknown. A source's `shape:` in one stage applies to all stages.

        Raises:
            ShapeError: the model's `config.json` is on this machine and contradicts the recipe's `shape:`.
        """
        found = model.random or self._shape_here(model)
        if found is not None and model.random is None:
            model.check_shape(found, str(model.source))
        return found or model.shape or self._given.get(model.source or "")

    def structure(self, model: ModelInput) -> ModelShape | None:
        """A model's shape, with another number of vocabulary rows if only that is unknown; None if more is unknown."""
        stage, _ = stage_and_step(self.recipe, model.source or "")
        return self.shape(model) or (self.structures.get(stage.name) if stage is not None else None)

    def _shape_here(self, model: ModelInput) -> ModelShape | None:
        assert model.source is not None
        stage, _ = stage_and_step(self.recipe, model.source)
        if stage is not None:
            return self.shapes.get(stage.name) or self.made(stage.name)
        path = Path(model.source).expanduser()
        if path.is_dir():
            return _shape_in(path)
        config = cached_config(model.source, model.revision)
        return ModelShape.from_folder(config.parent) if config else None

    def made(self, name: str) -> ModelShape | None:
        """The shape of the model that a finished stage wrote; None if it wrote none, or is not finished."""
        folder = self.folder / name
        return _shape_in(folder) if is_finished(folder) else None

    def data_stage(self, reference: str) -> BuildData | None:
        """The build_data stage of that name, or the one that wrote that folder; None if there is none."""
        if reference in {stage.name for stage in self.recipe.stages}:
            found = self.recipe.stage(reference)
            return found if isinstance(found, BuildData) else None
        folder = self._data_folder(reference)
        if not is_finished(folder):
            return None
        try:
            return BuildData.model_validate(read_manifest(folder).get("stage"))
        except ValidationError:  # another kind of stage, or of another version: the stage that reads it reports it
            return None

    def sharding(self, name: str) -> Sharding:
        """How the DeepSpeed JSON of that name shards a model.

        Raises:
            RecipeError: there is none, or it cannot be read.
        """
        return read_sharding(find_deepspeed_json(name, self.recipe_path))

    def length(self, reference: str | None) -> int | None:
        """The number of tokens in a block of that data; None if unknown."""
        data = self.data_stage(reference) if reference is not None else None
        return data.sequence_length if data else None

    def blocks(self, reference: str) -> int | None:
        """The number of that data's training blocks; None until it is built, unless it has a token budget."""
        data, folder = self.data_stage(reference), self._data_folder(reference)
        if data is None:
            return None
        if is_finished(folder):
            blocks = read_manifest(folder).get("metrics", {}).get("blocks")
            if blocks is not None:
                return int(blocks)
        return data.tokens // data.sequence_length if data.tokens is not None else None

    def training_plan(self, stage: AnyTraining) -> TrainingPlan | None:
        """Steps and tokens of a training stage, whose steps are stored; None if unknown until its data is built.

        Raises:
            RecipeError: it would train on less than one sequence.
        """
        length = self.length(stage.data)
        plan = plan_training(stage, length, self.blocks(stage.data)) if length else None
        if plan is not None:
            check_length(stage.name, stage, plan)
            self.steps[stage.name] = plan.steps
        return plan

    def longest(self, reference: str, part: str = "train") -> int | None:
        """The number of positions that a model needs; None if unknown, as for chat until its data is built.

        Args:
            part: `train` or `held_out`.
        """
        data = self.data_stage(reference)
        if data is None or data.format == "text":
            return data.sequence_length if data else None
        folder = self._data_folder(reference)
        if not is_finished(folder):
            return None
        from minima.data.store import TokenStore  # imports numpy, which is slow

        try:
            return TokenStore.open(folder / part).longest
        except MinimaError:  # damaged or deleted: the stage that reads it reports it
            return None

    def _data_folder(self, reference: str) -> Path:
        own = reference in {stage.name for stage in self.recipe.stages}
        return self.folder / reference if own else Path(reference).expanduser()


def _bytes_of_a_token(vocabulary_size: int) -> int:
    return 2 if vocabulary_size <= 1 << 16 else 4  # minima.data.store.token_dtype


def _shape_in(folder: Path) -> ModelShape | None:
    """Shape of the model in a stage's or a Hugging Face folder, searched in the same order as weights are."""
    checkpoints = folder / "checkpoints"
    for step in complete_steps(checkpoints):  # all checkpoints of a stage have the same shape
        try:
            facts = json.loads((step_folder(checkpoints, step) / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # reported when the checkpoint is read
            continue
        if isinstance(facts, dict) and isinstance(facts.get("config"), dict):
            return ModelShape.from_config(facts["config"])
    holder = folder / "model" if (folder / "model").is_dir() else folder
    return ModelShape.from_folder(holder) if (holder / "config.json").is_file() else None


def cached_config(name: str, revision: str | None) -> Path | None:
    """The `config.json` of a Hub id in the local cache; None if it is not there. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
