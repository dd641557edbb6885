"""`minima law study`: run what is left of a grid, on this machine or as Slurm arrays, and write its table. No torch."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from minima.disk_errors import disk_full_named
from minima.errors import RecipeError, StageError
from minima.launcher import num_accelerators, num_cores
from minima.law.study.collect import CSV, OVERVIEW, PARQUET, collect, overview
from minima.law.study.grid import Unit, expand
from minima.law.study.recipe import Study, load_study, resolved_yaml, warnings
from minima.law.study.worker_pool import Pool, Tally
from minima.recipe.loading import read_yaml
from minima.recipe.overrides import nearest
from minima.report.tables import text_table
from minima.stages.driver.checks import check_stages
from minima.stages.lock import run_lock
from minima.stages.run_folder import check_run_folder

STUDY = "study.yaml"
FAILED = 1


def study(
    path: Path,
    overrides: Sequence[str],
    write: Callable[[str], None],
    *,
    workers: int | None = None,
    collect_only: bool = False,
    dry_run: bool = False,
    cluster: Path | None = None,
    runs: Sequence[str] | None = None,
) -> int:
    """Run what is left of a study, and write its table.

    Args:
        workers: number of parallel processes; the study's own, or one per GPU or core, when not given.
        collect_only: run nothing, and write the table of what is finished.
        dry_run: show the grid and its cost, and with `cluster` the scripts; run and write nothing.
        cluster: a cluster file: submit the runs as Slurm arrays instead.
        runs: make only these, in this process, as a task of such an array does.

    Returns:
        0; 1 if a run failed or was left undone; 128 plus the signal's number if a signal ended it.

    Raises:
        MinimaError: the study is refused, and nothing was changed.
    """
    _check_asked(workers, {"--dry-run": dry_run, "--collect": collect_only, "--runs": runs, "--cluster": cluster})
    own = load_study(path, list(overrides))
    units = expand(own, path)
    if runs is not None:
        return _make(units, path, runs)
    for warning in warnings(own):
        write(f"warning: {warning}")
    _check_folder(own)
    if collect_only:
        write(_collected_text(own, units))
        return 0
    folders = [unit.folder for unit in units]
    for unit in units:
        check_run_folder(unit.folder, unit.recipe)
        check_stages(
            unit.recipe, path, unit.recipe.stages, unit.folder, 1, to_come=folders,
            ranks_elsewhere=dry_run or cluster is not None,
        )  # fmt: skip
    if dry_run:
        write(_plan(own, units))
    if cluster is not None:
        from minima.law.study.jobs import submit

        return submit(own, units, cluster, dry_run, write)
    if dry_run:
        return 0
    workers = workers or own.workers or num_accelerators() or num_cores()
    return _run(own, units, [str(path), *overrides], workers, write)


def _check_asked(workers: int | None, asked: Mapping[str, object]) -> None:
    """Refuse an impossible number of workers, and options of which one would be ignored."""
    if workers is not None and workers < 1:
        raise RecipeError(
            f"--workers {workers}",
            "nothing would train",
            "give a number of at least 1, or leave it out for one per GPU, or per core without GPUs",
        )
    given = [name for name, value in asked.items() if value not in (None, False)]
    if workers is not None:
        given += ["--workers"] if set(given) - {"--dry-run"} else []
    if len(given) > 1 and set(given) != {"--dry-run", "--cluster"}:
        raise RecipeError(
            f"{' and '.join(given)} together",
            "each asks for something different, so one of them would be ignored",
            "give only one; --dry-run can be combined with --cluster only, and then shows the scripts",
        )


def _make(units: Sequence[Unit], path: Path, runs: Sequence[str]) -> int:
    from minima.law.study.worker import make

    named = {unit.name: unit for unit in units}
    if unknown := [name for name in runs if name not in named]:
        raise RecipeError(
            f"no run of the study is called {unknown[0]!r}{nearest(unknown[0], list(named))}",
            "only runs of its grid can be made",
            "use the names of the folders inside the study's folder, such as data/corpus",
        )
    return make(named, path, runs)


def _run(own: Study, units: Sequence[Unit], arguments: Sequence[str], workers: int, write) -> int:
    with disk_full_named(own.folder), run_lock(own.folder) as lock:
        (own.folder / STUDY).write_text(resolved_yaml(own), encoding="utf-8")
        command = [sys.executable, "-m", "minima.law.study.worker", *arguments]
        pool = Pool(units, command, workers, own.folder / "logs", lock, _Live(own, units, write).show)
        tally = pool.run()
        write(overview(own, units, tally))
        write(_collected_text(own, units))
    left = [unit.name for unit in units if unit.name not in tally.done and unit.name not in tally.failed]
    if tally.stopped:
        write("ended by a signal; the same command continues from what is saved")
        return 128 + tally.stopped
    if left and not tally.failed:  # after a failure, the overview shows which runs are left
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        write(f"left undone: {', '.join(left[:3])}{more}; the same command continues with them")
    return FAILED if tally.failed or left else 0


class _Live:
    """The overview while the study runs: redrawn on a terminal, one line per change in a log."""

    def __init__(self, own: Study, units: Sequence[Unit], write: Callable[[str], None]) -> None:
        self.own, self.units, self.write = own, units, write
        self.lines = 0
        self.before: tuple = ()

    def show(self, tally: Tally) -> None:
        """Show the overview if it has changed; its file always holds the latest."""
        now = (len(tally.done), sorted(tally.running), sorted(tally.failed))
        if now == self.before:
            return
        self.before = now
        text = overview(self.own, self.units, tally)
        (self.own.folder / OVERVIEW).write_text(text, encoding="utf-8")
        if sys.stdout.isatty():
            if self.lines:
                sys.stdout.write(f"\x1b[{self.lines}F\x1b[J")  # go up to its first line, and clear
            self.write(text)
            self.lines = text.count("\n") + 1
        else:
            left = len(self.units) - now[0] - len(now[1]) - len(now[2])
            running = f" ({', '.join(now[1])})" if now[1] else ""
            self.write(f"{now[0]} done, {len(now[1])} running{running}, {left} left, {len(now[2])} failed")


def _check_folder(own: Study) -> None:
    """Refuse the folder of another study."""
    kept = own.folder / STUDY
    name = read_yaml(kept).get("name") if kept.is_file() else own.name
    if name != own.name:
        raise StageError(
            f"{own.folder} is the folder of another study ({name!r}; this one is {own.name!r})",
            "runs of two studies would be mixed in one grid",
            "choose another folder with output=PATH",
        )


def _collected_text(own: Study, units: Sequence[Unit]) -> str:
    rows, grid = collect(own, units), [unit for unit in units if unit.cell is not None]
    if not rows:
        return f"none of {len(grid)} cells is finished yet, so there is no table"
    return f"{len(rows)} of {len(grid)} cells: {own.folder / CSV} and {own.folder / PARQUET}"


def _plan(own: Study, units: Sequence[Unit]) -> str:
    members = [
        (kind, name, shape.parameters, shape.non_embedding_parameters, ", ".join(f"{t / size:.1f}" for t in tokens))
        for kind, names, tokens in (
            ("teacher", own.teachers, own.teacher_tokens()),
            ("student", own.students, own.tokens),
        )
        for name in names
        if (shape := own.shape_of(name)) and (size := shape.non_embedding_parameters)
    ]
    rows = []
    for level in dict.fromkeys(unit.level for unit in units):
        of_level = [unit for unit in units if unit.level == level]
        done = sum(unit.is_done() for unit in of_level)
        rows.append((level, len(of_level), done, sum(unit.flops for unit in of_level) / 1e12))
    table = text_table(members, ("", "shape", "parameters", "without embeddings", "tokens per parameter"))
    return f"{table}\n\n{text_table(rows, ('runs', 'number', 'finished', 'TFLOPs'))}"
