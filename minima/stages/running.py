"""What every rank does: runs stages one after another in one process group, and publishes each."""

import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minima import errors
from minima.disk_errors import disk_full_named, file_errors_named
from minima.errors import MinimaError, StageError
from minima.launcher import Launch, slurm_job, started_by_driver
from minima.models.checksums import write_checksums
from minima.planning.arithmetic import check_batch
from minima.recipe.references import uses_ranks
from minima.recipe.schema import AnyStage, AnyTraining, Recipe
from minima.stages.context import StageContext
from minima.stages.identity import check_read, check_unchanged, describe
from minima.stages.lock import run_lock
from minima.stages.machine_errors import machine_errors_named
from minima.stages.manifest import (
    NFS_SECONDS,
    is_finished,
    look_again,
    read_manifest,
    wait_finished,
    write_manifest,
    write_started,
)
from minima.stages.run_folder import access_named, check_run_folder, claim_run_folder

HEADER = "== stage "  # starts the line that rank 0 prints when it starts a stage; the driver splits its logs there
_KINDS = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, MinimaError)]
# Matches the start of the line that reports a user's mistake, but no progress line of a stage called `minima`.
ERROR = rf"minima: (?=(?:{'|'.join(_KINDS)}): )"
# A file server keeps the locks of a machine that it has lost, by default for 90 s (Linux nfsd, nfsv4leasetime).
_REQUEUED_SECONDS = 120.0
_POLL_SECONDS = 0.5  # how often other ranks check a stage that rank 0 runs alone


@file_errors_named()
def run_stage_command(
    recipe: Recipe, recipe_path: Path, names: Sequence[str] | None, launch: Launch, write, allow_code_execution: bool
) -> None:
    """Run `minima stage` on one rank: `run_stages` under the run folder's lock, unless the driver holds it already."""
    stages = recipe.select(names)
    folder = recipe.folder
    with disk_full_named(folder), ExitStack() as stack:
        if launch.rank == 0:
            check_run_folder(folder, recipe)
            if not started_by_driver():
                job = slurm_job()
                stack.enter_context(run_lock(folder, _REQUEUED_SECONDS if job and job.restarts else 0.0))
        run_stages(recipe, recipe_path, stages, launch, write, allow_code_execution)


def run_stages(
    recipe: Recipe,
    recipe_path: Path,
    stages: Sequence[AnyStage],
    launch: Launch,
    write,
    allow_code_execution: bool = False,
    keep_group: bool = False,
) -> None:
    """Run the unfinished ones of `stages` in this process, which is one rank of `launch`.

    Args:
        stages: in the recipe's order.
        write: receives a line of text for the user; called on rank 0 only.
        allow_code_execution: let a benchmark execute code that a model wrote.
        keep_group: keep the process group for another run in this process.

    Raises:
        MinimaError: a stage cannot run; finished stages are not touched.
    """
    run_folder = recipe.folder
    for stage in stages:
        if isinstance(stage, AnyTraining) and not is_finished(run_folder / stage.name):
            check_batch(stage.name, stage, launch.world_size)  # without a driver, nothing has checked it yet
    planned: dict[str, str] = {}
    for stage in stages:
        folder = run_folder / stage.name
        if launch.world_size > 1:
            look_again(folder)  # ranks of two machines have to agree on what is finished
        if launch.rank == 0 and is_finished(folder):  # other nodes may lack an earlier stage's inputs
            check_unchanged(describe(recipe, stage, run_folder, planned), folder, recipe)
    if launch.rank == 0:
        check_read(recipe, stages, run_folder)
        claim_run_folder(run_folder, recipe)
    group_started = False
    for stage in [stage for stage in stages if not is_finished(run_folder / stage.name)]:
        folder = run_folder / stage.name
        module = importlib.import_module(f"minima.stages.{stage.kind}")
        if uses_ranks(stage) and not group_started:
            from minima.engine import distributed

            distributed.start(launch)
            group_started = True
        if uses_ranks(stage) or launch.rank == 0:
            with disk_full_named(folder):
                context = StageContext(recipe, recipe_path, stage, folder, run_folder, launch, allow_code_execution)
                with machine_errors_named(stage, launch.world_size if uses_ranks(stage) else 1):
                    _run(module, context, write)
        else:
            _wait(folder)
    if group_started and not keep_group:
        distributed.stop()  # not after an error, since teardown would wait for ranks that wait for this one


def _run(module, context: StageContext, write) -> None:
    main, folder = context.launch.rank == 0, context.folder
    _begin(context, write)
    began = time.monotonic()
    with _alone(context.stage):
        metrics = module.run(context)
    if uses_ranks(context.stage):
        from minima.engine import distributed

        distributed.barrier()
    if main:
        seconds = time.monotonic() - began
        write_checksums(folder, editable=context.stage.kind == "export")
        write_manifest(folder, metrics, seconds)
        if hasattr(module, "tidy"):
            module.tidy(context)
        write(f"stage {context.stage.name} finished in {seconds:.1f} s")
    if uses_ranks(context.stage):
        distributed.barrier()
        if not wait_finished(folder, NFS_SECONDS):  # the next stage reads this manifest on every rank
            raise StageError(
                f"rank {context.launch.rank} does not see the manifest in {folder}, which rank 0 has published",
                "the next stage would not find its input there",
                "use a folder that all machines share (output=PATH)",
            )


def _begin(context: StageContext, write) -> None:
    """Check and start the stage's folder on rank 0; if rank 0 refuses it, every rank raises the error."""
    refusal: MinimaError | None = None
    if context.launch.rank == 0:
        try:
            with disk_full_named(context.folder):
                description = describe(context.recipe, context.stage, context.run_folder)
                check_unchanged(description, context.folder, context.recipe)
                write(f"{HEADER}{context.stage.name} ({context.stage.kind})")
                with access_named(context.folder):
                    context.folder.mkdir(parents=True, exist_ok=True)
                    write_started(context.folder, description)
        except MinimaError as error:
            refusal = error
    if uses_ranks(context.stage):
        from minima.engine import distributed

        distributed.raise_together(refusal)
    elif refusal is not None:
        raise refusal


@contextmanager
def _alone(stage: AnyStage) -> Iterator[None]:
    """Wrap a stage that runs in a single process: in a process group, the other ranks wait for its folder."""
    if uses_ranks(stage) or "torch.distributed" not in sys.modules:  # no group then; build_data must not import torch
        yield
        return
    from minima.engine import distributed

    with distributed.without_other_ranks():
        yield


def _wait(folder: Path) -> None:
    while not wait_finished(folder, 0):  # rank 0's launcher ends this rank when rank 0 fails
        time.sleep(_POLL_SECONDS)
    read_manifest(folder)
