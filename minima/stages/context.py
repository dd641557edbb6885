"""The context passed to a stage: its recipe, its folder, and the location of its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minima.errors import StageError
from minima.launcher import Launch
from minima.models.checksums import verify_tokenizer
from minima.models.layout import VOCABULARY_FILES, complete_steps
from minima.recipe.references import STEPPED, stage_and_step
from minima.recipe.schema import AnyStage, ModelInput, Recipe
from minima.stages.hub import snapshot
from minima.stages.manifest import NFS_SECONDS, wait_finished
from minima.stages.shipped import find_deepspeed_json

_TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json")


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine."""

    name: str  # as in the recipe: `student`, `student@12000`, a path or a Hub id
    folder: Path  # the folder to pass to `open_weights`: a stage's or a Hugging Face folder
    step: int | None  # the checkpoint to use; None for the newest, or if there are no checkpoints
    tokenizer: Path | None  # the folder of its tokenizer; None if it has none


@dataclass(frozen=True)
class StageContext:
    """One stage about to run on this rank."""

    recipe: Recipe
    recipe_path: Path
    stage: AnyStage
    folder: Path  # the stage's own folder; exists
    run_folder: Path  # contains the folders of all stages of the run
    launch: Launch  # this rank's place in the process group
    allow_code_execution: bool = False  # whether the user allowed executing code that a model wrote

    def data(self, reference: str) -> Path:
        """The folder of a build_data stage, given by the stage's name or by path.

        Raises:
            StageError: the stage has not finished, or there is no such folder.
            StoreCorrupted: its tokenizer is missing or changed.
        """
        stage, _ = stage_and_step(self.recipe, reference)
        path = Path(reference).expanduser() if stage is None else self._finished(stage)
        if stage is None and not (path / "train").is_dir():
            raise StageError(
                f"data {reference!r} is neither a stage of this recipe nor a folder that build_data wrote",
                f"stage {self.stage.name!r} would have no text to read",
                "name a build_data stage, or give the path of its folder (which contains train/ and tokenizer/)",
            )
        verify_tokenizer(path)
        return path

    def model(self, model: ModelInput | str) -> ResolvedModel:
        """Resolve a stage, one of its checkpoints, a folder or a Hub id to a folder on this machine.

        A Hub id that is not in the cache is downloaded. `ModelInput.random` has no folder: the caller builds it.

        Raises:
            StageError: the stage has not finished, or the model cannot be found.
            StoreCorrupted: its tokenizer is missing or changed.
        """
        text = model if isinstance(model, str) else model.source
        assert text is not None, "random weights have no folder"
        stage, step = stage_and_step(self.recipe, text)
        if stage is not None:
            folder = self._checkpoint(stage, step) if step is not None else self._finished(stage)
            verify_tokenizer(folder)
            tokenizer = folder / ("tokenizer" if stage.kind in STEPPED else "model")
            return ResolvedModel(text, folder, step, tokenizer if tokenizer.is_dir() else None)
        path = Path(text).expanduser()
        if not path.is_dir():
            revision = None if isinstance(model, str) else model.revision
            path = snapshot(text, revision, self.run_folder, keep=self.launch.rank == 0)
        verify_tokenizer(path)
        # A model's folder, or that of a stage of another run, which keeps its tokenizer in one of the other two.
        places = (path, path / "tokenizer", path / "model")
        found = (place for place in places if any((place / name).is_file() for name in _TOKENIZER_FILES))
        return ResolvedModel(text, path, None, next(found, None))

    def scores(self, reference: str) -> Path:
        """The folder with `scores.safetensors` of a prune stage, given by the stage's name or by path.

        Raises:
            StageError: the stage has not finished, or there are no scores.
        """
        stage, _ = stage_and_step(self.recipe, reference)
        folder = self._finished(stage) if stage is not None else Path(reference).expanduser()
        if not (folder / "scores.safetensors").is_file():
            raise StageError(
                f"scores {reference!r} is not a folder with a scores.safetensors",
                "there would be nothing to rank heads and neurons by",
                "name a prune stage that has run, or omit `scores` to measure them",
            )
        return folder

    def deepspeed_json(self, name: str) -> Path:
        """The DeepSpeed JSON beside the recipe, or else the shipped one of that name."""
        return find_deepspeed_json(name, self.recipe_path)

    def _finished(self, stage: AnyStage) -> Path:
        folder = self.run_folder / stage.name
        several = self.launch.world_size > 1  # another machine may just have finished it
        if not wait_finished(folder, NFS_SECONDS if several else 0):
            raise StageError(
                f"stage {stage.name!r} has not finished in {folder}",
                f"stage {self.stage.name!r} reads its output",
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
    """What to do about a checkpoint that a training stage has not saved.

    Args:
        there: steps of the checkpoints in it.
    """
    steps = f"choose among {', '.join(map(str, there))}, or " if there else ""
    if getattr(stage, "patience", None) is not None:
        return (
            f"{steps}remove `patience`, which deletes all checkpoints after the best one, and {folder} to train again"
        )
    return f"{steps}remove {folder} to train it again: the checkpoints that a recipe names are kept"
