"""Renders a job's script and the command that submits it. All user-chosen names are quoted or kept out of scripts."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minima.cluster.config import Cluster, Resources, Scheduling
from minima.errors import ClusterError
from minima.stages.shipped import shipped_folder

_DIRECTIVE = re.compile(r"--[a-z-]+(=[A-Za-z0-9_.,:=+/@%&|*()\[\]-]*)?")  # safe in a #SBATCH line
# Many commands fail silently; `minima status` shows this line. A preamble may set its own trap instead.
_LAST_WORDS = """begun=
last_words() { [ -n "$begun" ] || echo "the job ended before its stage began, with exit code $1, at: $2"; }
trap 'last_words $? "$BASH_COMMAND"' EXIT"""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\\]")
_MOUNT = re.compile(r"[,:]")  # separators in a list of mounts, and within a mount


@dataclass(frozen=True)
class Place:
    """Where and how a run's jobs run."""

    cluster: Cluster
    working_directory: Path  # absolute; every command starts there
    run_folder: Path  # as in the recipe, so relative to the working directory, or absolute
    flags: tuple[str, ...] = ()  # flags of `minima stage` for every job

    @property
    def logs(self) -> Path:
        """The folder of all logs, absolute."""
        return self.working_directory / self.run_folder / "logs"

    @property
    def scripts(self) -> Path:
        """The folder of scripts and job records, absolute."""
        return self.working_directory / self.run_folder / "cluster"


@dataclass(frozen=True)
class Script:
    """A job that can be submitted."""

    name: str
    stage: str  # the stage that it runs; `cells` for a grid
    role: str  # see `jobs.Job`
    resources: Resources  # the resources that it requests
    text: str  # of the script
    # all options for sbatch's command line, since the user's SBATCH_* variables override #SBATCH lines
    options: tuple[str, ...]
    path: Path  # where the script is written
    cells: tuple[str, ...] = ()  # names of a grid's cells, in the order of the array's tasks
    stages: tuple[str, ...] = ()  # the stages that each cell runs
    recipe: Path = Path()  # the copy of the recipe that it reads
    # of that recipe, by the name of the stage, or of the cell in a grid
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)  # see `asked_of`

    def command(self, after: Sequence[str], ended: Sequence[str] = ()) -> list[str]:
        """The command that submits it.

        Args:
            after: ids of jobs that must succeed before it.
            ended: ids of jobs that must end before it.
        """
        kinds = [f"{kind}:{':'.join(jobs)}" for kind, jobs in (("afterok", after), ("afterany", ended)) if jobs]
        waits = [f"--dependency={','.join(kinds)}", "--kill-on-invalid-dep=yes"] if kinds else []
        return ["sbatch", "--parsable", *waits, *self.options, str(self.path)]


def check_place(place: Place) -> None:
    """Refuse folders whose paths cannot be passed to sbatch or srun.

    Raises:
        ClusterError: a path contains a control character or a backslash, or a mounted path a comma or a colon.
    """
    if place.cluster.container is not None and _MOUNT.search(str(place.working_directory)):
        raise ClusterError(
            f"the working directory {str(place.working_directory)!r} contains a comma or a colon",
            "it is mounted in the container, and these characters separate mounts: another folder would be mounted",
            "submit from another folder, or from a link to this one whose name contains neither",
        )
    for path in (place.working_directory, place.run_folder):
        if _UNPRINTABLE.search(str(path)):
            raise ClusterError(
                f"the folder {str(path)!r} contains a backslash or a control character",
                "Slurm interprets such characters in the names of logs by its own rules",
                "choose another folder with output=PATH, or another working directory",
            )


def render(
    place: Place, *, name: str, stage: str, role: str, resources: Resources, work: Sequence[str], note: str
) -> Script:
    """Render a job's script.

    Args:
        name: of the job: letters, digits, `_`, `.` and `-`.
        role: see `jobs.Job`.
        work: its last lines, already quoted.
        note: one line that says what it does; names in it have only letters, digits, `_`, `.` and `-`.
    """
    array = role in ("parts", "cells")
    log = f"{stage}-%A_%a.log" if array else f"{stage}-%j.log"
    options = [f"--job-name={name}", *_resource_options(resources, array), *_constant_options(place.cluster)]
    options += [f"--chdir={place.working_directory}", f"--output={str(place.logs).replace('%', '%%')}/{log}"]
    inside = [option for option in options if _DIRECTIVE.fullmatch(option)]
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in inside)]
    # SC2016: quoted text is meant literally, including `$`
    lines += [f"# {note} Written by `minima submit`.", "# shellcheck disable=SC2016", "set -eo pipefail", ""]
    lines += [*_setup(place, resources), "set -u", ""]
    body = (shipped_folder("slurm") / "run_stage.sh").read_text(encoding="utf-8")
    lines += [*_settings(place), "", body.split("\n", 1)[1], *work]
    path = place.scripts / (f"{stage}.sbatch" if role in ("stage", "cells") else f"{stage}.{role}.sbatch")
    text, asked = "\n".join(lines) + "\n", asked_of(place, resources)
    return Script(name, stage, role, resources, text, tuple(options), path, asked=asked)


def asked_of(place: Place, resources: Resources) -> dict[str, Any]:
    """All settings that a job with these resources takes from the cluster file, by its keys, and from the flags."""
    shared = place.cluster.model_dump(mode="json", exclude={"defaults", "stages"})
    return {**shared, **resources.model_dump(mode="json"), "flags": list(place.flags)}


def quoted(arguments: Sequence[str]) -> str:
    """The arguments as one string, quoted for a shell."""
    return " ".join(shlex.quote(argument) for argument in arguments)


def python(place: Place, resources: Resources) -> list[str]:
    """The command that starts Python in a job: the container's, the venv's, or the one that submits."""
    container = place.cluster.container
    if container is None:
        return ["python" if place.cluster.venv else sys.executable]
    if container.runtime == "pyxis":
        return ["python"]
    mounts = [f"--bind={mount}" for mount in (str(place.working_directory), *container.mounts)]
    gpus = ["--nv"] if resources.gpus_per_node else []
    where = f"--pwd={place.working_directory}"
    return ["apptainer", "exec", *gpus, *mounts, where, *container.options, container.image, "python"]


def _resource_options(resources: Resources, array: bool) -> list[str]:
    gpu_type = f"{resources.gpu_type}:" if resources.gpu_type else ""
    options = [f"--nodes={resources.nodes or 1}", f"--ntasks-per-node={resources.ranks_per_node or 1}"]
    options += [f"--gpus-per-node={gpu_type}{resources.gpus_per_node}"] if resources.gpus_per_node else []
    options += [f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []
    options += [f"--mem={resources.memory}"] if resources.memory else []
    options += ["--exclusive"] if resources.exclusive else []
    for key in Scheduling.model_fields:
        if value := getattr(resources, key):
            options.append(f"--{key}={value}")
    if array:
        limit = f"%{resources.array_limit}" if resources.array_limit else ""
        options.append(f"--array=0-{(resources.array or 1) - 1}{limit}")
    return options + (resources.sbatch_options or [])


def _constant_options(cluster: Cluster) -> list[str]:
    return [
        f"--signal=B:USR1@{cluster.signal_lead_seconds}",
        "--requeue" if cluster.requeue else "--no-requeue",
        "--open-mode=append",  # a requeued job continues its log
        "--export=ALL",
    ]


def _setup(place: Place, resources: Resources) -> list[str]:
    cluster = place.cluster
    lines = [_LAST_WORDS, f"cd {shlex.quote(str(place.working_directory))}", *cluster.preamble]
    if cluster.venv:
        lines += ["# shellcheck disable=SC1091", f"source {shlex.quote(cluster.venv + '/bin/activate')}"]
    lines += ["export HF_HUB_OFFLINE=1"] if resources.hub_offline else []
    lines += [f"export OMP_NUM_THREADS={resources.cpus_per_task}"] if resources.cpus_per_task else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    return [*lines, "begun=yes"]


def _settings(place: Place) -> list[str]:
    cluster = place.cluster
    options = list(cluster.srun_options)
    if cluster.container is not None and cluster.container.runtime == "pyxis":
        here = f"{place.working_directory}:{place.working_directory}"
        options.append(f"--container-image={cluster.container.image}")
        options.append(f"--container-mounts={','.join([here, *cluster.container.mounts])}")
        options.append(f"--container-workdir={place.working_directory}")
        options += cluster.container.options
    lines = [f"srun_options=({quoted(options)})"]
    if not cluster.requeue:
        return [*lines, "max_requeues=0"]
    return lines if cluster.max_requeues is None else [*lines, f"max_requeues={cluster.max_requeues}"]
