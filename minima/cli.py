"""The `minima` command. Each command imports what it needs when it runs, so help and dry runs never load torch."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import minima
from minima.console import UNREAD, quietly, show, show_own, silenced, write, write_to_end
from minima.disk_errors import file_errors_named
from minima.errors import FileFailed, MinimaError, Stopped
from minima.evaluation.chat_command import add_chat
from minima.law.command import add_law

USER_ERROR, OWN_ERROR = 2, 1
_PLANNED_FOR = {
    "gpus": (int, "N", "of the whole run; the recipe's ranks when not given"),
    "gpu": (str, "KIND", "such as h100, or a YAML file that describes one"),
    "gpus_per_node": (int, "N", "of one machine; 8 when nothing says otherwise"),
    "gpu_memory": (
        float,
        "BYTES",
        "memory that the driver reports for one GPU (default: the published size, which may be up to 7 %% less)",
    ),
    "gpu_flops": (float, "X", "dense bfloat16 FLOP/s, instead of what is published"),
    "network_bandwidth": (float, "X", "bytes/s between one GPU and other machines"),
    "host_memory": (float, "BYTES", "of one machine"),
    "efficiency": (float, "X", "fraction of peak FLOP/s that a step reaches (default: measured or assumed)"),
    "price": (float, "X", "of one GPU-hour, in your currency"),
    "benchmarks": (Path, "DIR", "folder of tools/bench_distil.py results (default: those shipped)"),
}
_OTHER_RANK_SECONDS = 3.0  # launchers end the other ranks about a second after the first one fails


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a user error, 1 an internal or file error."""
    return quietly(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, extra = parser.parse_known_args(arguments)
    if any(text.startswith("-") for text in extra) or (extra and not hasattr(options, "overrides")):
        parser.error(f"unknown arguments: {' '.join(extra)}")
    if hasattr(options, "overrides"):
        options.overrides += extra  # argparse does not collect positional arguments that follow an option
    try:
        return file_errors_named()(options.command)(options)
    except MinimaError as error:
        show(error)
        return _refused(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minima", description="The best smaller model that a large one can become.")
    parser.add_argument("--version", action="version", version=f"minima {minima.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the stages of a recipe that are not finished")
    _takes_recipe(run)
    run.add_argument("--launcher", metavar="X", help="start the ranks by launch/X.sh instead of the recipe's")
    run.add_argument("--ranks", type=int, metavar="N", help="processes on this machine instead of the recipe's")
    run.add_argument("--dry-run", action="store_true", help="show what would happen, and the arithmetic; run nothing")
    _may_execute(run)
    run.set_defaults(command=_run)

    stage = commands.add_parser("stage", help="run stages in this process: what each rank does under any launcher")
    stage.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    names = "NAME|key.path=value"
    stage.add_argument("overrides", nargs="*", default=[], metavar=names, help="stages (A,B) and overrides")
    stage.add_argument("--stages", metavar="A,B", help="only these; all that are not finished when not given")
    _may_execute(stage)
    stage.add_argument("--part", metavar="I/N", help="encode only the I-th of N parts (from 0) of a build_data stage")
    stage.set_defaults(command=_stage)

    submit = commands.add_parser("submit", help="run the stages that are not finished as jobs on a Slurm cluster")
    _takes_recipe(submit)
    submit.add_argument(
        "--cluster", required=True, metavar="FILE", help="YAML: partition, resources of each stage, set-up"
    )
    submit.add_argument("--grid", metavar="FILE", help="YAML: run the recipe once for each cell, as one job array")
    submit.add_argument("--dry-run", action="store_true", help="print scripts and sbatch commands; submit nothing")
    _may_execute(submit)
    submit.set_defaults(command=_submit)

    status = commands.add_parser("status", help="stages, jobs, progress and failures of a run")
    status.add_argument("run", metavar="RUN", help="the run's folder, or its recipe")
    status.set_defaults(command=_status)

    cancel = commands.add_parser("cancel", help="cancel a run's jobs; what is running saves first")
    cancel.add_argument("run", metavar="RUN", help="the run's folder, or its recipe")
    cancel.set_defaults(command=_cancel)

    doctor = commands.add_parser("doctor", help="check this machine, or each rank of an allocation under a launcher")
    doctor.add_argument(
        "--folder",
        metavar="DIR",
        default=".",
        help="where runs will be written; must exist on every machine (default: here)",
    )
    doctor.set_defaults(command=_doctor)

    fetch = commands.add_parser("fetch", help="download a recipe's models and data, for nodes without a network")
    _takes_recipe(fetch, "only what these read; all when not given")
    fetch.set_defaults(command=_fetch)

    add_chat(commands)
    add_law(commands, write)

    plan = commands.add_parser("plan", help="parameters, memory, traffic, time and cost of a recipe on given GPUs")
    _takes_recipe(plan)
    for name, (kind, metavar, text) in _PLANNED_FOR.items():
        plan.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)
    plan.add_argument("--json", action="store_true", help="print all numbers as JSON")
    plan.set_defaults(command=_plan)

    publish = commands.add_parser("publish", help="push an exported model to the Hub, in one commit")
    publish.add_argument("folder", metavar="DIR", help="an export stage's folder, or its model/")
    publish.add_argument("--push", required=True, metavar="REPO", help="organisation/name on the Hub")
    publish.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")
    publish.add_argument("--revision", metavar="B", help="branch to push to; made when it is not there")
    publish.add_argument("--message", metavar="M", help="commit message")
    publish.set_defaults(command=_publish)
    return parser


def _takes_recipe(command: argparse.ArgumentParser, stages: str = "only these; all when not given") -> None:
    command.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="change the recipe")
    command.add_argument("--stages", metavar="A,B", help=stages)


def _may_execute(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-code-execution", action="store_true", help="let benchmarks execute what a model wrote"
    )


def _run(options: argparse.Namespace) -> int:
    from minima.stages.driver import pipeline
    from minima.stages.shipped import find_launcher, find_recipe

    overrides = list(options.overrides)
    overrides += [f"ranks={options.ranks}"] if options.ranks is not None else []
    overrides += [f"launcher={options.launcher}"] if options.launcher is not None else []
    path = find_recipe(options.recipe)
    if options.dry_run:
        from minima.recipe.loading import is_study, load_recipe
        from minima.stages.preview.dry_run import dry_run_text

        if is_study(path):
            from minima.law.study.running import study

            return study(path, overrides, write, dry_run=True)
        recipe = load_recipe(path, overrides)
        find_launcher(recipe.launcher, path)
        write(dry_run_text(recipe, path, recipe.select(_names(options.stages))))
        return 0
    return pipeline.run(path, overrides, _names(options.stages), write, options.allow_code_execution)


def _stage(options: argparse.Namespace) -> int:
    from minima.launcher import read_launch
    from minima.recipe.loading import load_recipe
    from minima.stages.running import run_stage_command
    from minima.stages.shipped import find_recipe

    names = _names(",".join(text for text in (options.stages, *options.overrides) if text and "=" not in text) or None)
    overrides = [text for text in options.overrides if "=" in text]
    launch = read_launch()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("minima").setLevel(logging.INFO if launch.rank == 0 else logging.WARNING)
    try:
        path = find_recipe(options.recipe)
        recipe = load_recipe(path, overrides)
        if options.part is not None:
            from minima.stages.part import run_part

            run_part(recipe, path, names, options.part, launch, write)
        else:
            run_stage_command(recipe, path, names, launch, write, options.allow_code_execution)
    except Stopped as stopped:
        if launch.rank == 0:
            write(str(stopped))
        return _leave(128 + stopped.signal, launch.world_size)
    except MinimaError as error:
        if launch.rank != 0:  # usually rank 0 reports it and this rank is ended meanwhile; if not, this rank reports it
            time.sleep(_OTHER_RANK_SECONDS)
            sys.stderr.write(f"[rank {launch.rank}] ")
        show(error)
        return _leave(_refused(error), launch.world_size)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and silenced():
            return _leave(UNREAD, launch.world_size)
        show_own(error, launch.rank)
        return _leave(OWN_ERROR, launch.world_size)
    return _leave(0, launch.world_size)


def _submit(options: argparse.Namespace) -> int:
    from minima.cluster.submit import submit
    from minima.stages.shipped import find_recipe

    grid = None if options.grid is None else Path(options.grid).expanduser()
    cluster, names = Path(options.cluster).expanduser(), _names(options.stages)
    path, allowed = find_recipe(options.recipe), options.allow_code_execution
    return submit(path, options.overrides, cluster, names, grid, options.dry_run, write_to_end, allowed)


def _status(options: argparse.Namespace) -> int:
    from minima.cluster.status import status

    return status(options.run, write)


def _cancel(options: argparse.Namespace) -> int:
    from minima.cluster.cancel import cancel

    return cancel(options.run, write_to_end)


def _doctor(options: argparse.Namespace) -> int:
    from minima.cluster.doctor import doctor
    from minima.launcher import read_launch

    launch = read_launch()
    return _leave(doctor(Path(options.folder).expanduser(), write), launch.world_size)


def _fetch(options: argparse.Namespace) -> int:
    from minima.stages.fetch import fetch
    from minima.stages.shipped import find_recipe

    return fetch(find_recipe(options.recipe), options.overrides, _names(options.stages), write)


def _plan(options: argparse.Namespace) -> int:
    from minima.stages.preview.plan_command import PlanOptions, plan_command

    asked = PlanOptions(**{name: getattr(options, name) for name in _PLANNED_FOR})
    write(plan_command(options.recipe, options.overrides, asked, _names(options.stages), options.json))
    return 0


def _publish(options: argparse.Namespace) -> int:
    from minima.stages.release.hub_push import publish

    pushed = publish(
        Path(options.folder).expanduser(),
        options.push,
        private=not options.public,
        revision=options.revision,
        message=options.message,
    )
    write("\n".join(pushed.lines()))
    return 0


def _refused(error: MinimaError) -> int:
    """The exit code of an error; after a 2 a job's script would not ask Slurm whether a node was lost."""
    return OWN_ERROR if isinstance(error, FileFailed) else USER_ERROR


def _leave(code: int, world_size: int) -> int:
    """Exit a rank at once with this code, skipping the libraries' teardown.

    After a failure, teardown would wait for ranks that wait for this one; after a success, it has been seen to crash
    a rank, which the launcher would report as a failed job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if world_size > 1:
        os._exit(code)
    return code


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
