"""`minima stage --part I/N`: encodes one part of a build_data stage, while other parts may run at the same time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minima.disk import write_json
from minima.disk_errors import disk_full_named, file_errors_named
from minima.errors import LauncherError, RecipeError
from minima.launcher import Launch
from minima.recipe.schema import BuildData, Recipe
from minima.stages.context import StageContext
from minima.stages.identity import check_unchanged, describe
from minima.stages.lock import run_lock
from minima.stages.manifest import STARTED, is_begun, is_finished, read_manifest, write_started
from minima.stages.run_folder import check_run_folder, claim_run_folder
from minima.stages.running import HEADER

# Parts that start together take the run folder's lock in turn, each only while it checks that the folder belongs to
# this run.
_LOCK_SECONDS = 60.0


def parse_part(text: str) -> tuple[int, int]:
    """Parse `I/N` into the part's number and the total.

    Raises:
        RecipeError: the text is not of this form, or I is not below N.
    """
    number, slash, total = text.partition("/")
    if not (slash and number.isascii() and number.isdigit() and total.isascii() and total.isdigit()):
        raise RecipeError(
            f"--part {text!r} is not I/N",
            "it says which part to encode, and how many parts there are",
            "give the part's number, counted from 0, and the number of parts: --part 3/16",
        )
    if not int(number) < int(total):
        raise RecipeError(
            f"--part {text}: {total} parts are numbered 0 to {int(total) - 1}" if int(total) else f"--part {text}",
            "there is no such part, and nothing would be encoded",
            "count from 0: a job array over N parts is --array=0-(N-1)",
        )
    return int(number), int(total)


@file_errors_named()
def run_part(recipe: Recipe, recipe_path: Path, names: Sequence[str] | None, part: str, launch: Launch, write) -> None:
    """Encode one part of a build_data stage into the stage's `parts/`; `minima stage` without `--part` merges them.

    The run folder's lock is held only while the folder is checked, so that parts can run at the same time, but none
    starts during a run in that folder. Each part has its own lock.

    Args:
        names: of the stage; None for the recipe's only build_data stage.
        part: `I/N`.
        launch: this process's place; it must be alone.

    Raises:
        MinimaError: the part cannot be encoded; other parts are not touched.
    """
    number, total = parse_part(part)
    stages = recipe.select(names)
    if names is None:
        stages = [stage for stage in stages if isinstance(stage, BuildData)]
    if len(stages) != 1 or not isinstance(stages[0], BuildData):
        chosen = ", ".join(f"{stage.name} ({stage.kind})" for stage in stages) or "none"
        raise RecipeError(
            f"--part {part} with the stages {chosen}",
            "exactly one stage, of kind build_data, can be divided at a time",
            "name it: --stages NAME",
        )
    if launch.world_size > 1:
        raise LauncherError(
            f"--part {part} under a launcher with {launch.world_size} ranks",
            "a part is the work of one process, which starts its own workers",
            "start it once for each part, as the tasks of a job array",
        )
    stage, run_folder = stages[0], recipe.folder
    folder = run_folder / stage.name
    with disk_full_named(folder):
        description = describe(recipe, stage, run_folder)
        with run_lock(run_folder, _LOCK_SECONDS):
            check_run_folder(run_folder, recipe)
            check_unchanged(description, folder, recipe)
            if is_finished(folder):
                write(f"stage {stage.name} was already finished")
                return
            claim_run_folder(run_folder, recipe)
            _begin(folder, description, total)
        from minima.stages import build_data

        with run_lock(build_data.lock_folder(folder, (number, total))):
            write(f"{HEADER}{stage.name} ({stage.kind}), part {number}/{total}")
            context = StageContext(recipe, recipe_path, stage, folder, run_folder, launch)
            write(build_data.encode_part(context, (number, total)))


def _begin(folder: Path, description: dict[str, Any], total: int) -> None:
    """Record what is being made, once for all parts, and refuse a different number of parts."""
    from minima.data.parts.files import PARTS
    from minima.data.parts.merging import check_counts

    folder.mkdir(parents=True, exist_ok=True)
    check_counts(folder / PARTS, total)
    same = (folder / STARTED).is_file() and read_manifest(folder, STARTED).get("identity") == description["identity"]
    if not (same and is_begun(folder)):
        write_started(folder, description)
    started = read_manifest(folder, STARTED)
    if started.pop("began", None) is not None:  # parts measure their own time; idle time between them must not count
        write_json(folder / STARTED, started)
