"""Submit a study as Slurm arrays: the data, then the teachers, then the cells; each task makes a few runs. No torch."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from minima.cluster.chain import submit_chain
from minima.cluster.config import CELLS
from minima.cluster.plan import make_place
from minima.cluster.queued import queued_tasks
from minima.cluster.render import Place, Script, python, quoted, render
from minima.errors import ClusterError
from minima.law.study.grid import Unit
from minima.law.study.recipe import Study, resolved_yaml
from minima.stages.lock import run_lock

RECIPES = "recipes"


def submit(
    study: Study,
    units: Sequence[Unit],
    cluster: Path,
    dry_run: bool,
    write: Callable[[str], None],
) -> int:
    """Submit the runs that are not finished: one array per level, each after the previous one.

    A task has one rank and what the cluster file's `stages.cells` asks for; it makes `units_per_job` runs in one
    process. Submitting again, once nothing of the study is queued, continues with what is left.

    Args:
        dry_run: print the scripts and the sbatch commands.

    Raises:
        ClusterError: jobs of the study are queued, a job would get several ranks, or Slurm refuses.
    """
    place = make_place(units[0].recipe.model_copy(update={"output": str(study.folder)}), cluster)
    resources = place.cluster.merged(CELLS)
    if resources.ranks > 1:
        raise ClusterError(
            f"the cluster file's stages.cells asks for {resources.ranks} ranks",
            "each run of a study has one rank, so the others would do nothing",
            "set stages.cells.nodes and ranks_per_node to 1 (gpus_per_node, too)",
        )
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(run_lock(place.scripts))
        if queued := queued_tasks(place.run_folder, dry_run, write):
            raise ClusterError(
                f"jobs of this study are queued or running: {', '.join(sorted({job.id for job, _ in queued}))}",
                "a second job for a run would find its folder in use",
                "wait for them, or `minima cancel` them",
            )
        recipe = place.run_folder / "cluster" / RECIPES / f"{study.name}.yaml"
        left = [unit for unit in units if not unit.is_done()]
        levels = dict.fromkeys(unit.level for unit in left)
        scripts = [_script(study, place, recipe, level, [u for u in left if u.level == level]) for level in levels]
        if not scripts:
            write("nothing to submit: every run is finished")
            return 0
        if not dry_run:
            recipe.parent.mkdir(parents=True, exist_ok=True)
            recipe.write_text(resolved_yaml(study), encoding="utf-8")
        submit_chain(scripts, [], place, dry_run, write)
    write(f"when they have ended: minima law study {recipe} --collect")
    return 0


def _script(study: Study, place: Place, recipe: Path, level: str, units: Sequence[Unit]) -> Script:
    size = study.units_per_job if level != "data" else 1
    ordered = sorted(units, key=lambda unit: unit.flops)  # so that the runs of one task take about equally long
    tasks = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    resources = place.cluster.merged(CELLS).model_copy(update={"array": len(tasks)})
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for index, task in enumerate(tasks):
        command = [*python(place, resources), "-m", "minima", "law", "study", str(recipe)]
        command += ["--runs", ",".join(unit.name for unit in task)]
        lines += [f"{index})", f"  run_alone {quoted([str(place.run_folder), level, *command])}", "  ;;"]
    lines.append("esac")
    return render(
        place,
        name=f"{study.name}.{level}",
        stage=level,
        role="cells",
        resources=resources,
        work=lines,
        note=f"{len(units)} runs of a study ({level}), at most {size} per process.",
    )
