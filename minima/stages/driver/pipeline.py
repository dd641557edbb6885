"""The driver behind `minima run`: runs unfinished stages in process groups and reports their outcome. No torch."""

import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minima.disk_errors import disk_full_named
from minima.errors import LauncherError, StoreCorrupted
from minima.launcher import child_environment, read_launch
from minima.models.checksums import missing_files
from minima.recipe.loading import load_recipe
from minima.recipe.references import uses_ranks
from minima.recipe.schema import AnyStage, Recipe
from minima.report.run_table import run_table
from minima.stages.driver.checks import BY_HOST_FILE, check_stages
from minima.stages.driver.child import Log, run_child
from minima.stages.driver.summary import stage_rows, write_summary
from minima.stages.identity import check_run
from minima.stages.lock import run_lock
from minima.stages.manifest import is_finished, read_manifest
from minima.stages.preview.known_inputs import planned_ranks
from minima.stages.run_folder import check_run_folder, claim_run_folder
from minima.stages.shipped import find_launcher

# Neighbours of these kinds share a process group, because starting one costs 10 s.
SHORT_KINDS = ("prune", "evaluate", "export")
KILLED = 128 + signal.SIGKILL
_WANT_OF_MEMORY = (
    ": a process was killed (SIGKILL); if nobody did that by hand, the machine has probably run out of memory: smaller "
    "micro-batches need less, and with more machines each holds a smaller part of the models"
)
# Exit codes of a process group that was ended by a signal, or by losing the reader of its output.
STOPPED = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM))
ALLOW_CODE_EXECUTION = "--allow-code-execution"


def run(
    recipe_path: Path,
    overrides: Sequence[str],
    names: Sequence[str] | None,
    write: Callable[[str], None],
    allow_code_execution: bool = False,
) -> int:
    """Run the unfinished stages of a recipe in order, each in its own process group (short neighbours share one).

    Args:
        overrides: `key.path=value`; passed on to the ranks.
        names: only these stages; None for all.
        allow_code_execution: let a benchmark execute code that a model wrote; passed on to the stages.

    Returns:
        0, or the exit code of the first process group that failed.

    Raises:
        MinimaError: the run cannot start, and nothing was changed; or an input changed meanwhile, and every stage is
            kept.
    """
    _refuse_inside_ranks()
    recipe = load_recipe(recipe_path, overrides)
    stages = recipe.select(names)
    folder = recipe.folder
    ranks = planned_ranks(recipe)
    check_run_folder(folder, recipe)
    for line in check_stages(recipe, recipe_path, stages, folder, ranks):
        write(f"warning: {line}")
    if allow_code_execution:
        overrides = [*overrides, ALLOW_CODE_EXECUTION]
    with disk_full_named(folder), run_lock(folder) as lock:
        claim_run_folder(folder, recipe)
        left = [stage for stage in stages if not is_finished(folder / stage.name)]
        done = [stage.name for stage in stages if stage not in left]
        if done:
            write(f"already finished: {', '.join(done)}")
        for line in lacking(folder, done, allow_code_execution):
            write(f"warning: {line}")
        for group in (groups := group_stages(left)):
            code = _run_group(recipe, recipe_path, overrides, group, ranks, lock, write)
            if code in STOPPED and all(is_finished(folder / stage.name) for stage in group):
                if group is groups[-1]:  # the signal came too late to stop anything
                    break
                write(f"a signal came as stage {group[-1].name} ended; the same command resumes after it")
            if code:
                return code
        if all(is_finished(folder / stage.name) for stage in recipe.stages):
            check_run(recipe, left, folder)  # an input may have changed while these stages ran
        summary = write_summary(recipe, folder)
    write(run_table(stage_rows(recipe, folder), summary))
    if summary is not None:
        state = "every stage was already finished" if not left else "every stage is finished"
        write(f"all done: {state}; {folder / 'summary.json'}")
    else:
        later = [stage.name for stage in recipe.stages if not is_finished(folder / stage.name)]
        write(f"done: {', '.join(stage.name for stage in stages)}; left: {', '.join(later)}")
    return 0


def lacking(run_folder: Path, finished: Sequence[str], allow_code_execution: bool) -> list[str]:
    """What finished stages lack, because it was deleted or left out, one line each."""
    found = []
    for name in finished:
        folder = run_folder / name
        try:
            gone = missing_files(folder)
        except StoreCorrupted as error:
            found.append(error.what)
            continue
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            found.append(f"stage {name} is finished, but {folder / gone[0]}{more} no longer exists")
        manifest = read_manifest(folder) if allow_code_execution else {}
        left_out = manifest.get("metrics", {}).get("left_out", [])
        if left_out and manifest.get("stage", {}).get("kind") == "benchmark":
            found.append(
                f"{ALLOW_CODE_EXECUTION} does not change stage {name}, which was finished without "
                f"{', '.join(left_out)}: remove {folder} to run it again"
            )
    return found


def group_stages(stages: Sequence[AnyStage]) -> list[list[AnyStage]]:
    """Group stages in order: neighbouring short ones together, all others alone."""
    groups: list[list[AnyStage]] = []
    for stage in stages:
        short = stage.kind in SHORT_KINDS
        if short and groups and groups[-1][-1].kind in SHORT_KINDS:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _run_group(
    recipe: Recipe,
    recipe_path: Path,
    overrides: Sequence[str],
    group: Sequence[AnyStage],
    ranks: int,
    lock: int,
    write: Callable[[str], None],
) -> int:
    folder = recipe.folder
    names = ",".join(stage.name for stage in group)
    arguments = [str(recipe_path), "--stages", names, *overrides]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if uses_ranks(group[0]):
        by_file = recipe.ranks is None and recipe.launcher in BY_HOST_FILE
        environment = child_environment(ranks, by_host_file=by_file, terminal_columns=columns)
        command = ["bash", str(find_launcher(recipe.launcher, recipe_path)), *arguments]
    else:
        environment = child_environment(1, terminal_columns=columns)
        command = [sys.executable, "-m", "minima", "stage", *arguments]
    with Log(folder / "logs", group[0].name) as log:
        code = run_child(command, environment, log, lock)
    if log.lacks:
        write(f"warning: the logs in {folder / 'logs'} lack lines that could not be written: {log.lacks}")
    left = [stage for stage in group if not is_finished(folder / stage.name)]
    if code == 0 and left:
        code = 1
    if code:
        name = left[0].name if left else group[-1].name
        log_file = folder / "logs" / f"{name}.log"
        if code in STOPPED and not left:
            return code
        if code in STOPPED and not log.error:
            write(f"stage {name} was ended by a signal; the same command resumes from what it has saved ({log_file})")
            return code
        reason = f": {log.error}" if log.error else _WANT_OF_MEMORY if log.killed or code == KILLED else ""
        write(f"stage {name} failed with exit code {code}{reason}\nits log is {log_file}")
    return code


def _refuse_inside_ranks() -> None:
    launch = read_launch()
    if launch.world_size > 1:
        raise LauncherError(
            f"minima run inside rank {launch.rank} of {launch.world_size}",
            "it starts ranks itself, so every rank would start a whole run",
            "call `minima run` once, without a launcher; or `minima stage` under this launcher",
        )
