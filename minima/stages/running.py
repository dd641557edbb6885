"""What every rank does: run stages one after another in one process group, and publish each."""

import importlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from minima.errors import RecipeError
from minima.launcher import Launch, started_by_driver
from minima.recipe.loading import resolved_yaml
from minima.recipe.schema import AnyStage, Recipe
from minima.stages.context import StageContext
from minima.stages.lock import run_lock
from minima.stages.manifest import check_unchanged, describe, is_finished, read_manifest, write_manifest, write_started
from minima.stages.run_folder import check_run_folder, claim_run_folder

HEADER = "== stage "  # begins the line that rank 0 prints as it starts a stage; the driver cuts its logs there
ERROR = "minima: "  # begins the line that tells a user's mistake
_POLL_SECONDS = 0.5


def select(recipe: Recipe, names: Sequence[str] | None) -> list[AnyStage]:
    """The stages of those names in the recipe's order; all of them for None.

    Raises:
        RecipeError: a name is no stage of the recipe.
    """
    if names is None:
        return list(recipe.stages)
    wanted = {recipe.stage(name).name for name in names}
    if not wanted:
        raise RecipeError("no stages are chosen", "nothing would run", "name stages, or leave --stages out for all")
    return [stage for stage in recipe.stages if stage.name in wanted]


def uses_ranks(stage: AnyStage) -> bool:
    """Whether a stage of this kind runs on every rank (the driver asks without importing the stage's file)."""
    return stage.kind != "build_data"


def output_folder(recipe: Recipe) -> Path:
    """Where the run's stages lie; relative to where the command runs."""
    return Path(recipe.output or f"runs/{recipe.name}").expanduser()


def run_alone(recipe: Recipe, recipe_path: Path, names: Sequence[str] | None, launch: Launch, write) -> None:
    """What `minima stage` does on each rank: `run_stages` under the run folder's lock, unless the driver holds it."""
    stages = select(recipe, names)
    with ExitStack() as stack:
        if launch.rank == 0:
            check_run_folder(output_folder(recipe), recipe.name, [stage.name for stage in recipe.stages])
            if not started_by_driver():
                stack.enter_context(run_lock(output_folder(recipe)))
        run_stages(recipe, recipe_path, stages, launch, write)


def run_stages(recipe: Recipe, recipe_path: Path, stages: Sequence[AnyStage], launch: Launch, write) -> None:
    """Run the unfinished ones of `stages` in this process, which is one rank of `launch`.

    Args:
        recipe: the whole run.
        recipe_path: its file.
        stages: in the recipe's order.
        launch: this rank's place.
        write: takes one line of text for a person; called on rank 0 only.

    Raises:
        MinimaError: a stage cannot run; nothing that was finished is touched.
    """
    run_folder = output_folder(recipe)
    for stage in stages:
        if is_finished(run_folder / stage.name):
            check_unchanged(describe(recipe, stage, run_folder), run_folder / stage.name)
    if launch.rank == 0:
        claim_run_folder(run_folder, recipe.name, [stage.name for stage in recipe.stages], resolved_yaml(recipe))
    group_started = False
    for stage in [stage for stage in stages if not is_finished(run_folder / stage.name)]:
        folder = run_folder / stage.name
        module = importlib.import_module(f"minima.stages.{stage.kind}")
        if module.RANKS and not group_started:
            from minima.engine import distributed

            distributed.start(launch)
            group_started = True
        if module.RANKS or launch.rank == 0:
            _run(module, StageContext(recipe, recipe_path, stage, folder, run_folder, launch), write)
        else:
            _wait(folder)
    if group_started:  # after an error nothing is torn down: that would wait for ranks that wait for this one
        distributed.stop()


def _run(module, context: StageContext, write) -> None:
    main, folder = context.launch.rank == 0, context.folder
    description = describe(context.recipe, context.stage, context.run_folder)
    check_unchanged(description, folder)
    if main:
        write(f"{HEADER}{context.stage.name} ({context.stage.kind})")
        folder.mkdir(parents=True, exist_ok=True)
        write_started(folder, description)
    if module.RANKS:
        from minima.engine import distributed

        distributed.barrier()
    began = time.monotonic()
    metrics = module.run(context)
    if module.RANKS:
        distributed.barrier()
    if main:
        seconds = time.monotonic() - began
        write_manifest(folder, metrics, seconds)
        write(f"stage {context.stage.name} finished in {seconds:.1f} s")
    if module.RANKS:
        distributed.barrier()  # the next stage reads this manifest on every rank


def _wait(folder: Path) -> None:
    while not is_finished(folder):  # rank 0's launcher ends this rank when rank 0 fails
        time.sleep(_POLL_SECONDS)
    read_manifest(folder)
