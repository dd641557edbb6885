"""What a stage is handed: its recipe and folder, and where its inputs lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minima.errors import StageError
from minima.launcher import Launch
from minima.models.layout import VOCABULARY_FILES, complete_steps
from minima.recipe.references import STEPPED, stage_and_step
from minima.recipe.schema import AnyStage, ModelInput, Recipe
from minima.stages.hub import snapshot
from minima.stages.manifest import NFS_SECONDS, wait_finished
from minima.stages.shipped import find_deepspeed_json

_TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json")


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine.

    Attributes:
        name: as the recipe calls it: `student`, `student@12000`, a path or a Hub id.
        folder: what `open_weights` is given: a stage's folder or a Hugging Face folder.
        step: the checkpoint to take; none for the newest, or where there are no checkpoints.
        tokenizer: the folder of its tokenizer; none when it has none.
    """

    name: str
    folder: Path
    step: int | None
    tokenizer: Path | None


@dataclass(frozen=True)
class StageContext:
    """One stage about to run on this rank.

    Attributes:
        recipe: the whole run.
        recipe_path: the recipe's file.
        stage: the stage to run.
        folder: the stage's own; exists.
        run_folder: holds all stages of the run.
        launch: this rank's place in the process group.
        allow_code_execution: whether the person who started the run lets code that a model wrote be executed.
    """

    recipe: Recipe
    recipe_path: Path
    stage: AnyStage
    folder: Path
    run_folder: Path
    launch: Launch
    allow_code_execution: bool = False

    def data(self, reference: str) -> Path:
        """The folder of a build_data stage, or one given by its path.

        Raises:
            StageError: the stage has not finished, or there is no such folder.
        """
        stage, _ = stage_and_step(self.recipe, reference)
        if stage is not None:
            return self._finished(stage)
        path = Path(reference).expanduser()
        if not (path / "train").is_dir():
            raise StageError(
                f"data {reference!r} is neither a stage of this recipe nor a folder that build_data wrote",
                f"stage {self.stage.name!r} would have no text to read",
                "name a build_data stage, or give the path of its folder (it holds train/ and tokenizer/)",
            )
        return path

    def model(self, model: ModelInput | str) -> ResolvedModel:
        """A stage, one of its checkpoints, a folder, or a Hub id as a folder on this machine.

        A Hub id is downloaded when it is not in the cache yet. `ModelInput.random` has no folder: the caller makes it.

        Raises:
            StageError: the stage has not finished, or the model cannot be found.
        """
        text = model if isinstance(model, str) else model.source
        assert text is not None, "random weights have no folder"
        stage, step = stage_and_step(self.recipe, text)
        if stage is not None:
            folder = self._checkpoint(stage, step) if step is not None else self._finished(stage)
            tokenizer = folder / ("tokenizer" if stage.kind in STEPPED else "model")
            return ResolvedModel(text, folder, step, tokenizer if tokenizer.is_dir() else None)
        path = Path(text).expanduser()
        if not path.is_dir():
            revision = None if isinstance(model, str) else model.revision
            path = snapshot(text, revision, self.run_folder, keep=self.launch.rank == 0)
        has_tokenizer = any((path / name).is_file() for name in _TOKENIZER_FILES)
        tokenizer = path if has_tokenizer else path / "tokenizer"
        return ResolvedModel(text, path, None, tokenizer if tokenizer.is_dir() else None)

    def scores(self, reference: str) -> Path:
        """The folder of a prune stage, or one given by its path, whose `scores.safetensors` is read.

        Raises:
            StageError: the stage has not finished, or there are no scores.
        """
        stage, _ = stage_and_step(self.recipe, reference)
        folder = self._finished(stage) if stage is not None else Path(reference).expanduser()
        if not (folder / "scores.safetensors").is_file():
            raise StageError(
                f"scores {reference!r} name no folder with a scores.safetensors",
                "there would be nothing to rank heads and neurons by",
                "name a prune stage that has run, or leave `scores` out to measure them",
            )
        return folder

    def deepspeed_json(self, name: str) -> Path:
        """A DeepSpeed JSON beside the recipe, else the shipped one of that name."""
        return find_deepspeed_json(name, self.recipe_path)

    def _finished(self, stage: AnyStage) -> Path:
        folder = self.run_folder / stage.name
        several = self.launch.world_size > 1  # perhaps on several machines, of which one just finished it
        if not wait_finished(folder, NFS_SECONDS if several else 0):
            raise StageError(
                f"stage {stage.name!r} has not finished in {folder}",
                f"stage {self.stage.name!r} reads what it leaves",
                f"run it first: minima run {self.recipe_path} --stages {stage.name}",
            )
        return folder

    def _checkpoint(self, stage: AnyStage, step: int) -> Path:
        folder = self.run_folder / stage.name
        there = complete_steps(folder / "checkpoints")
        if step not in there:
            raise StageError(
                f"stage {stage.name!r} has no checkpoint after step {step}",
                f"stage {self.stage.name!r} reads it",
                missing_checkpoint_advice(stage, folder, there),
            )
        return folder


def missing_checkpoint_advice(stage: AnyStage, folder: Path, there: Sequence[int]) -> str:
    """What to do about a checkpoint that a training stage has not left.

    Args:
        stage: the one that was trained.
        folder: its own.
        there: steps of the checkpoints in it.
    """
    steps = f"choose among {', '.join(map(str, there))}, or " if there else ""
    if getattr(stage, "patience", None) is not None:
        return f"{steps}take `patience` away and remove {folder} to train again: with it the best one ends as the last"
    return f"{steps}remove {folder} to train it again: the checkpoints that a recipe names are kept"
