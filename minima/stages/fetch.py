"""`minima fetch`: downloads what a recipe reads from the Hub, on a machine with network access, for jobs without."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minima.disk_errors import disk_full_named
from minima.errors import StageError
from minima.launcher import cleaned_environment
from minima.recipe.data import Source
from minima.recipe.loading import load_recipe
from minima.recipe.references import Reference, references, sources
from minima.recipe.schema import AnyStage, Benchmark, BuildData, Publish, Recipe
from minima.stages.hub import snapshot
from minima.stages.run_folder import check_run_folder, claim_run_folder, has_recipe

FETCHED, THERE, LOCAL, MISSING, LEFT = "fetched", "already there", "on this machine", "MISSING", "NOT FETCHED"
NOTE = "left out"  # no job needs it
# Runs in its own process, as lm-eval always does. Creating the tasks downloads the data that they read.
_LM_EVAL = """
import sys
from lm_eval.tasks import TaskManager
folders, names = sys.argv[1].split(chr(10)), sys.argv[2].split(",")
TaskManager(include_path=[folder for folder in folders if folder]).load(names)
"""


@dataclass(frozen=True)
class Got:
    """The outcome for one input."""

    what: str  # the input: `model org/name`
    state: str  # one of the constants above
    more: str = ""  # size, location, or what to do


def fetch(
    recipe_path: Path, overrides: Sequence[str], names: Sequence[str] | None, write: Callable[[str], None]
) -> int:
    """Download a recipe's models, tokenizers, data sets and benchmarks into the Hub's cache on this machine.

    The commit of each model is recorded in the run's folder, as in a run, so that jobs use the same one.

    Args:
        names: only what these stages read; None for all.

    Returns:
        0 if jobs will find everything without a network, otherwise 1.

    Raises:
        MinimaError: the recipe cannot be read, a model or a data set cannot be downloaded, or the disk is full.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise StageError(
            "HF_HUB_OFFLINE=1 is set here",
            "nothing would be downloaded",
            "run it on a machine with network access: env -u HF_HUB_OFFLINE minima fetch ...",
        )
    recipe = load_recipe(recipe_path, overrides)
    cache, left, counts = Path(constants.HF_HUB_CACHE), 0, dict.fromkeys((FETCHED, THERE, LOCAL), 0)
    for stage in recipe.select(names):
        with disk_full_named(cache):
            for got in _inputs(recipe, stage, cache):
                left += got.state in (MISSING, LEFT)
                if got.state in counts:
                    counts[got.state] += 1
                write(f"{stage.name}: {got.what}: {got.state}{f' ({got.more})' if got.more else ''}")
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    write(f"{told}; the cache is {cache}")
    if left:
        write(f"{left} input{'s are' if left > 1 else ' is'} missing for a job without a network")
        return 1
    write("jobs that can read this cache may run with HF_HUB_OFFLINE=1")
    return 0


def _inputs(recipe: Recipe, stage: AnyStage, cache: Path) -> Iterator[Got]:
    for reference in references(recipe, stage):
        if reference.stage is None:
            yield _reference(recipe, stage, reference, cache)
    fields = stage.format == "text" if isinstance(stage, BuildData) else True
    for _, source in sources(stage):
        yield _source(source, source.field if fields else None, cache)
    if isinstance(stage, Benchmark):
        yield from _benchmark(stage)
    if isinstance(stage, Publish):
        yield Got(f"repository {stage.repo}", NOTE, "this stage pushes to the Hub: run it with network access")


def _reference(recipe: Recipe, stage: AnyStage, reference: Reference, cache: Path) -> Got:
    what = f"{reference.field} {reference.text}"
    path = Path(reference.text).expanduser()
    if path.exists():
        return Got(what, LOCAL)
    if reference.what in ("data", "scores") or isinstance(stage, Publish):
        return Got(what, MISSING, "it can only be a folder, not a Hub id: fix its path, or make the folder")
    folder = recipe.folder
    if has_recipe(folder):  # a run may be using the folder, so its recipe must not be overwritten
        check_run_folder(folder, recipe)
    else:
        claim_run_folder(folder, recipe)
    before = _files(cache, "models", reference.text)
    found = snapshot(reference.text, reference.revision, folder, keep=True, weights=reference.what != "tokenizer")
    return _got(f"{what}, commit {found.name[:12]}", before, _files(cache, "models", reference.text))


def _source(source: Source, field: str | None, cache: Path) -> Got:
    from minima.data.documents import Rejected
    from minima.data.parts.share import Share
    from minima.data.records import read_dataset

    if source.embedded is not None:
        return Got(f"text {source.embedded}", LOCAL, "minima ships it")
    if source.path is not None:
        files = source.files()
        if not files:
            return Got(f"files {source.path}", MISSING, "fix the path, or put files there")
        return Got(f"files {source.path}", LOCAL, f"{len(files):,} files")
    assert source.hub is not None
    what = f"data set {source.hub} ({', '.join(part for part in (source.config, source.split) if part)})"
    if Path(source.hub).expanduser().is_dir():
        return Got(what, LOCAL)
    if source.streaming:
        return Got(what, LEFT, "it is streamed, not downloaded: set streaming: false, or give its jobs network access")
    before = _files(cache, "datasets", source.hub)
    next(read_dataset(source, field, Rejected(), Share()), None)  # reading the first row downloads the whole data set
    return _got(what, before, _files(cache, "datasets", source.hub))


def _benchmark(stage: Benchmark) -> Iterator[Got]:
    from minima.evaluation.suite import Asked, plan_suite, plan_tasks, write_tasks

    for answers in stage.answers:
        there = Path(answers.questions).expanduser().is_file()
        yield Got(f"questions {answers.questions}", LOCAL if there else MISSING)
    asked: list[Asked] = []
    data = None if stage.data_folder is None else Path(stage.data_folder).expanduser()
    if data is not None and not data.is_dir():
        yield Got(f"data_folder {data}", MISSING, "make it with `python tools/fetch_benchmarks.py`")
        return
    if stage.suite:
        asked, left_out = plan_suite(data, allow_code_execution=False)
        if left_out and data is None:
            yield Got(
                f"benchmark {', '.join(left_out)}", NOTE, "it executes programs, which a run needs permission for"
            )
    if stage.tasks:
        asked += plan_tasks(stage.tasks, stage.num_fewshot, allow_code_execution=True)
    if not asked:
        return
    what = f"benchmarks {', '.join(one.name for one in asked)}"
    with tempfile.TemporaryDirectory() as scratch:
        folders = [write_tasks(Path(scratch) / "tasks", data)]
        folders += [Path(stage.task_folder).expanduser().resolve()] if stage.task_folder else []
        names = ",".join(task for one in asked for task in one.call.tasks)
        done = subprocess.run(
            [sys.executable, "-c", _LM_EVAL, "\n".join(map(str, folders)), names],
            env=cleaned_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Got(what, LEFT, f"lm-eval: {said[:300]}")
    else:
        yield Got(what, FETCHED, "the data that lm-eval reads")


def _files(cache: Path, kind: str, name: str) -> dict[str, int]:
    """A repository's files in the Hub's cache: size in bytes by file name."""
    folder = cache / f"{kind}--{name.replace('/', '--')}" / "blobs"
    return {path.name: path.stat().st_size for path in folder.glob("*") if path.suffix != ".incomplete"}


def _got(what: str, before: dict[str, int], after: dict[str, int]) -> Got:
    new = [size for name, size in after.items() if name not in before]
    if not new:
        return Got(what, THERE)
    return Got(what, FETCHED, f"{len(new):,} file{'s' if len(new) > 1 else ''}, {sum(new) / 1e6:,.1f} MB")
