"""`minima submit --grid`: runs one recipe with many sets of overrides as a job array, a task for each. No torch."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from minima.cluster.chain import submit_chain
from minima.cluster.config import CELLS, Resources
from minima.cluster.jobs import Job
from minima.cluster.plan import check_jobs, make_place, run_stage, summary, warn
from minima.cluster.queued import check_asked, queued_tasks, warn_asked
from minima.cluster.recipe_copy import copy_recipe
from minima.cluster.render import Place, Script, asked_of, python, render
from minima.cluster.runs import RESOLVED
from minima.cluster.saves import save_warnings
from minima.cluster.secret import check_values
from minima.disk import write_whole
from minima.errors import ClusterError
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.recipe.overrides import RecipeLoader, nearest
from minima.recipe.schema import Recipe
from minima.stages.driver.pipeline import ALLOW_CODE_EXECUTION, group_stages
from minima.stages.lock import run_lock
from minima.stages.manifest import is_finished
from minima.stages.run_folder import check_run_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=,-]*")
_DO = "write `cells: [{name: a, overrides: [key.path=value]}]`, or `axes: {key.path: [values]}`, or both"


def submit_grid(
    recipe_path: Path,
    overrides: Sequence[str],
    cluster_path: Path,
    names: Sequence[str] | None,
    grid: Path,
    dry_run: bool,
    write: Callable[[str], None],
    allow_code_execution: bool = False,
) -> int:
    """Submit the unfinished cells of a grid that have no job yet, as one job array.

    A cell is the whole recipe in its own folder, `RUN/cells/NAME`; its stages run one after another in one job, with
    the resources of the cluster file's `stages.cells`. Arguments and result are those of `submit`.

    Raises:
        MinimaError: the grid's file or one of its cells is invalid, or Slurm refuses.
    """
    check_values("overrides", overrides)
    recipe = load_recipe(recipe_path, overrides)
    place = make_place(recipe, cluster_path, (ALLOW_CODE_EXECUTION,) if allow_code_execution else ())
    warn(place, recipe, write)
    cells = read_grid(grid)
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(run_lock(place.scripts))
        queued = queued_tasks(place.run_folder, dry_run, write)
        waiting = {job.cells.get(str(task.index)): (job, f"job {job.id}_{task.index}") for job, task in queued}
        missing: dict[str, list[str]] = {}
        warnings: dict[str, None] = {}
        for number, (name, own) in enumerate(cells.items(), 1):
            check_values(f"cell {number}", own)
            folder = place.run_folder / "cells" / name
            output = json.dumps(str(folder), ensure_ascii=False)  # YAML reads this back, whatever the path
            changes = [*overrides, *own, f"output={output}"]
            cell = load_recipe(recipe_path, changes)
            if all(is_finished(folder / stage.name) for stage in cell.select(names)):
                write(f"{name}: finished")
            elif name in waiting:
                job, who = waiting[name]
                write(f"{name}: {_queued_text(job, cell, names, folder)}")
                check_asked(job, name, f"{name}: {who}", cell, recipe_path, place.run_folder, write)
            else:
                warnings |= dict.fromkeys(_check(cell, recipe_path, names, place, folder, dry_run))
                missing[name] = changes
        for job in {job.id: job for job, _ in queued}.values():
            warn_asked(job, f"job {job.id}", asked_of(place, _resources(place, len(job.cells))), write)
        for warning in warnings:
            write(f"warning: {warning}")
        if not missing:
            write("nothing to submit")
            return 0
        copy = copy_recipe(recipe, recipe_path, place.run_folder / "cluster" / "recipes", write=not dry_run)
        script = _script(recipe, recipe_path, copy, missing, names, place)
        if not dry_run:
            write_whole(place.scripts / RESOLVED, resolved_yaml(recipe))
        # Each cell has its own folder, so none has to wait for another.
        submit_chain([script], [], place, dry_run, write)
        write(f"cells: {', '.join(missing)}")
    return 0


def _queued_text(job: Job, cell: Recipe, names: Sequence[str] | None, folder: Path) -> str:
    """A line saying that a cell's job is queued, and which of the requested stages it will not run."""
    asked = [stage.name for stage in cell.select(names) if not is_finished(folder / stage.name)]
    # An early version recorded no stages when it meant all.
    left = [name for name in asked if job.stages and name not in job.stages]
    if not left:
        return "in the queue"
    again = f"submit again once it has ended, for {', '.join(left)}"
    return f"in the queue for {', '.join(job.stages)} only: {again}"


def read_grid(path: Path) -> dict[str, list[str]]:
    """The cells of a grid by name, each with its overrides.

    Args:
        path: YAML with `cells` (`name` and `overrides` of each), `axes` (values by `key.path`, all combinations), or
            both: then every cell is combined with all of the axes' combinations.

    Raises:
        ClusterError: it cannot be read, names no cell, or names one twice.
    """
    try:
        raw: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterError(
            f"the grid {path} cannot be read ({' '.join(str(error).split())})", "it says which cells there are", _DO
        ) from None
    unknown = [key for key in raw if key not in ("cells", "axes")] if isinstance(raw, dict) else []
    if not isinstance(raw, dict) or not raw or unknown:
        found = ", ".join(f"{key!r}{nearest(str(key), ['cells', 'axes'])}" for key in unknown) or "nothing"
        raise ClusterError(f"the grid {path} contains {found}", "it says which cells there are", _DO)
    cells = _cells(path, raw["cells"]) if "cells" in raw else [("", [])]
    products = _products(path, raw["axes"]) if "axes" in raw else [("", [])]
    named: dict[str, list[str]] = {}
    for (first, own), (second, changes) in itertools.product(cells, products):
        name = ",".join(part for part in (first, second) if part)
        if name in named or not _NAME.fullmatch(name):
            raise ClusterError(
                f"the grid {path} has {'two cells' if name in named else 'a cell'} called {name!r}",
                "a cell's name is its folder",
                "give each cell a unique name of letters, digits, _ . - = and ,",
            )
        named[name] = [*own, *changes]
    return named


def _cells(path: Path, raw: Any) -> list[tuple[str, list[str]]]:
    found = []
    for cell in raw if isinstance(raw, list) and raw else [None]:
        own = cell.get("overrides", []) if isinstance(cell, dict) else None
        if not isinstance(cell, dict) or set(cell) - {"name", "overrides"} or "name" not in cell:
            raise ClusterError(f"the grid {path} has a cell {cell!r}", "a cell has a name and overrides", _DO)
        if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
            raise ClusterError(f"cell {cell['name']!r} has overrides {own!r}", "they must be a list of strings", _DO)
        found.append((str(cell["name"]), own))
    return found


def _products(path: Path, raw: Any) -> list[tuple[str, list[str]]]:
    if not isinstance(raw, dict) or not raw or not all(isinstance(values, list) and values for values in raw.values()):
        raise ClusterError(f"the grid {path} has axes {raw!r}", "an axis is a key.path with a list of values", _DO)
    found = []
    for values in itertools.product(*raw.values()):
        pairs = list(zip(raw, values, strict=True))
        parts = [f"{key.split('.')[-1]}={_short(value)}" for key, value in pairs]
        if len({key.split(".")[-1] for key in raw}) < len(raw):  # for example two stages' seeds
            parts = [f"{key.removeprefix('stages.')}={_short(value)}" for key, value in pairs]
        changes = [
            f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()}" for key, value in pairs
        ]
        found.append((",".join(parts), [text.removesuffix("\n...") for text in changes]))
    return found


def _short(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", str(value))


def _check(
    cell: Recipe, recipe_path: Path, names: Sequence[str] | None, place: Place, folder: Path, dry_run: bool
) -> list[str]:
    check_run_folder(folder, cell)
    cluster = place.cluster.model_copy(update={"stages": {}, "defaults": place.cluster.merged(CELLS)})
    own, stages = Place(cluster, place.working_directory, folder), cell.select(names)
    saves = save_warnings([stage for stage in stages if not is_finished(folder / stage.name)], own, dry_run)
    return [*check_jobs(cell, recipe_path, stages, own), *(f"{folder.name}: {warning}" for warning in saves)]


def _resources(place: Place, num_cells: int) -> Resources:
    return place.cluster.merged(CELLS).model_copy(update={"array": num_cells})


def _script(
    recipe: Recipe,
    recipe_path: Path,
    copy: Path,
    cells: dict[str, list[str]],
    names: Sequence[str] | None,
    place: Place,
) -> Script:
    resources = _resources(place, len(cells))
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for index, (name, changes) in enumerate(cells.items()):
        folder = place.run_folder / "cells" / name
        lines.append(f"{index}) # {name}")
        for group in group_stages(load_recipe(recipe_path, changes).select(names)):
            stages = ",".join(stage.name for stage in group)
            command = [*python(place, resources), "-m", "minima", "stage", str(copy), "--stages", stages]
            command += [*changes, *place.flags]
            lines.append(f"  {run_stage(place, group[0], command, folder)}")
        if names is None or recipe.stages[-1].name in names:
            lines.append(f"  {summary(place, recipe, copy, changes, folder)}")
        lines.append("  ;;")
    lines.append("esac")
    made = render(
        place,
        name=f"{recipe.name}.cells",
        stage=CELLS,
        role="cells",
        resources=resources,
        work=lines,
        note=f"{len(cells)} cells of a grid, each with {resources.ranks} ranks on {resources.nodes or 1} nodes.",
    )
    chosen = tuple(stage.name for stage in recipe.select(names))
    return replace(made, cells=tuple(cells), stages=chosen, recipe=copy, overrides=cells)
