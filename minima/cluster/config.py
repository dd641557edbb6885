"""The cluster file: where jobs go, the resources of each stage, and how a job is set up. No torch."""

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from minima.cluster.secret import check_lines, names_secret, refuse_secret
from minima.errors import ClusterError
from minima.recipe.base import Strict
from minima.recipe.problems import LINE, SLURM_OPTION, SLURM_WORD
from minima.recipe.references import uses_ranks
from minima.recipe.schema import AnyStage

CELLS = "cells"  # the key of a grid's jobs under `stages`; no stage can have this name
_Word = Annotated[
    str,
    Field(pattern=SLURM_WORD),
    BeforeValidator(lambda value: str(value) if type(value) is int else value),  # `memory: 0`, `account: 4711`
]
_Option = Annotated[str, Field(pattern=SLURM_OPTION)]
_Line = Annotated[str, Field(pattern=LINE)]
_Path = Annotated[_Line, AfterValidator(os.path.expanduser)]  # scripts quote it, so no shell would expand it
_Mount = Annotated[_Line, AfterValidator(lambda text: ":".join(map(os.path.expanduser, text.split(":"))))]
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_MAX_SIGNAL_SECONDS = 65535  # sbatch(1), --signal


def _no_secrets(value: Any, info: ValidationInfo) -> Any:
    """Refuse secrets before any other validation, whose messages would repeat the value."""
    lines = value if isinstance(value, list) else [value]
    check_lines(str(info.field_name), [line for line in lines if isinstance(line, str)], info.field_name == "preamble")
    return value


class Scheduling(Strict):
    """Where a job goes; each key is the option of sbatch with the same name.

    Attributes:
        partition: of the cluster; the cluster's default if omitted.
        account: the account to charge.
        qos: quality of service.
        reservation: the reservation to run in.
        constraint: features that the nodes must have.
        time: limit of one start of a job: minutes, `HH:MM:SS` or `D-HH:MM:SS`. A stage may take many starts.
    """

    partition: _Word | None = None
    account: _Word | None = None
    qos: _Word | None = None
    reservation: _Word | None = None
    constraint: _Word | None = None
    time: str | None = None

    @field_validator("time", mode="before")
    @classmethod
    def _is_time(cls, value: Any) -> Any:
        if value is None:
            return None
        text = str(value)
        if isinstance(value, bool) or not isinstance(value, int | str) or not _TIME.fullmatch(text):
            raise ClusterError(
                f"the time limit {value!r} is not in a format that Slurm reads",
                "the scheduler would refuse the job, or end it at the wrong time",
                "write minutes, HH:MM:SS or D-HH:MM:SS",
            )
        return text


class Resources(Scheduling):
    """The resources that one stage requests.

    Attributes:
        nodes: number of machines; default 1. Kinds that run in a single process always get one.
        ranks_per_node: processes on each node; by default one for each GPU, or 1 without GPUs.
        gpus_per_node: GPUs on each node.
        gpu_type: type of the GPUs, by the cluster's name for it.
        cpus_per_task: CPU cores of each rank; also its OMP_NUM_THREADS.
        memory: of each node, as in sbatch's --mem (0 for all of it).
        exclusive: do not share the nodes with other jobs.
        array: number of jobs to divide a build_data stage into; a further job merges their results.
        array_limit: the maximum number of an array's jobs that run at the same time.
        hub_offline: run with HF_HUB_OFFLINE=1; by default False only for publish, which pushes to the Hub.
        sbatch_options: further options, each `--name=value`.
    """

    nodes: int | None = Field(default=None, gt=0)
    ranks_per_node: int | None = Field(default=None, gt=0)
    gpus_per_node: int | None = Field(default=None, ge=0)
    gpu_type: _Word | None = None
    cpus_per_task: int | None = Field(default=None, gt=0)
    memory: _Word | None = None
    exclusive: bool | None = None
    array: int | None = Field(default=None, gt=1)
    array_limit: int | None = Field(default=None, gt=0)
    hub_offline: bool | None = None
    sbatch_options: list[_Option] | None = None

    _without_secrets = field_validator("sbatch_options", mode="before")(_no_secrets)

    @property
    def ranks(self) -> int:
        """Processes on all nodes."""
        return (self.nodes or 1) * (self.ranks_per_node or 1)


class Container(Strict):
    """The container that a stage's processes run in, using the image's `python`, which needs minima installed.

    Attributes:
        image: a path, or a name that the runtime knows. `~` is the home of the user who submits.
        runtime: `pyxis` (srun --container-image) or `apptainer`.
        mounts: paths to mount: `PATH`, or `OUTSIDE:INSIDE`. The working directory is always mounted.
        options: further options of srun (pyxis) or of `apptainer exec` (apptainer).
    """

    image: _Path
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[_Mount] = []
    options: list[_Line] = []

    _without_secrets = field_validator("options", mode="before")(_no_secrets)


class Cluster(Scheduling):
    """A cluster file. A stage's name entry takes precedence, then its kind's, then `defaults`, then the top level.

    Attributes:
        signal_lead_seconds: how long before the time limit the ranks are told to save. Slurm may be a minute early.
        requeue: requeue a job after its time limit, a preemption or a lost node, so that it resumes.
        max_requeues: fail instead of starting a job again more often than this; unlimited if omitted.
        preamble: shell lines to run first, such as `module load cuda`.
        venv: folder of a virtual environment; `~` as for an image. Without this and without a container, the Python
            that submits is used.
        container: the container to run in.
        environment: variables of the jobs. Never a token: those are inherited from the shell that submits.
        hub_offline: set HF_HUB_OFFLINE=1, as compute nodes often have no network; see `minima fetch`.
        working_directory: where the commands run; by default where `minima submit` runs.
        srun_options: further options of srun, each `--name=value`.
        defaults: resources for every stage.
        stages: resources by a stage's name or kind, and under `cells` for the jobs of a grid.
    """

    signal_lead_seconds: int = Field(default=300, gt=0, le=_MAX_SIGNAL_SECONDS)
    requeue: bool = True
    max_requeues: int | None = Field(default=None, ge=0)
    preamble: list[_Line] = []
    venv: _Path | None = None
    container: Container | None = None
    environment: dict[str, str] = {}
    hub_offline: bool = True
    working_directory: _Path | None = None
    srun_options: list[_Option] = []
    defaults: Resources = Resources()
    stages: dict[str, Resources] = {}

    _without_secrets = field_validator("preamble", "srun_options", mode="before")(_no_secrets)

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
                raise ClusterError(
                    f"environment: {name!r} is not a valid variable name",
                    "the job's shell would reject it",
                    "use letters, digits and _, not starting with a digit",
                )
            if names_secret(str(name)):
                raise refuse_secret("environment", str(name))
            check_lines(f"environment: {name}", [str(text)], shell=False)
            if isinstance(text, dict | list) or text is None or "\0" in str(text):
                raise ClusterError(
                    f"environment: {name} is {text!r}", "a variable must be text", "write a text or a number"
                )
        return {name: "1" if text is True else "0" if text is False else str(text) for name, text in value.items()}

    @model_validator(mode="after")
    def _lead_fits(self) -> Self:
        for key, block in {"defaults": self.defaults, **self.stages}.items():
            seconds = time_seconds(block.time or self.defaults.time or self.time)
            if seconds is not None and seconds <= self.signal_lead_seconds:
                raise ClusterError(
                    f"{key}: a time limit of {seconds} s with signal_lead_seconds {self.signal_lead_seconds}",
                    "a job would be told to save and end right after it starts, and never make progress",
                    "give it more time, or lower signal_lead_seconds to the duration of a save",
                )
        return self

    def resources(self, stage: AnyStage) -> Resources:
        """The resources for a stage.

        Raises:
            ClusterError: an array of jobs for a stage that cannot be divided, or several ranks for a stage that runs in
                a single process.
        """
        found = self.merged(stage.kind, stage.name)
        own = {**_given_settings(self.stages.get(stage.kind)), **_given_settings(self.stages.get(stage.name))}
        if stage.kind != "build_data" and "array" in own:
            raise ClusterError(
                f"stages: {stage.name} ({stage.kind}) requests an array of jobs",
                "only a build_data stage can be divided into several jobs",
                "remove `array` there",
            )
        if not uses_ranks(stage):
            for key in ("nodes", "ranks_per_node"):
                if own.get(key, 1) != 1:
                    raise ClusterError(
                        f"stages: {stage.name} ({stage.kind}) requests {key} {own[key]}",
                        f"a {stage.kind} stage runs in a single process, so the rest would be paid for and idle",
                        f"remove `{key}` there",
                    )
            found = found.model_copy(update={"nodes": 1, "ranks_per_node": 1})
        return found if stage.kind == "build_data" else found.model_copy(update={"array": None})

    def merged(self, *keys: str) -> Resources:
        """Merge the top level, `defaults` and the entries of the given keys; later ones take precedence."""
        top = {name: value for name, value in _given_settings(self).items() if name in Scheduling.model_fields}
        merged = top | _given_settings(self.defaults)
        for key in keys:
            merged |= _given_settings(self.stages.get(key))
        merged.setdefault("ranks_per_node", merged.get("gpus_per_node") or 1)
        if keys[0] == "publish" and "hub_offline" not in merged:
            merged["hub_offline"] = False
        merged.setdefault("hub_offline", self.hub_offline)
        return Resources(**merged)


def _given_settings(block: Strict | None) -> dict[str, Any]:
    return {} if block is None else {name: getattr(block, name) for name in block.model_fields_set}


def time_seconds(text: str | None) -> int | None:
    """A Slurm time limit in seconds; None if there is none. One number means minutes, two minutes and seconds."""
    match = _TIME.fullmatch(text or "")
    if match is None:
        return None
    days, parts = match[1], [int(part) for part in match.groups()[1:] if part is not None]
    if days is not None:  # D-HH[:MM[:SS]]
        parts += [0] * (3 - len(parts))
        return int(days) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]
    if len(parts) < 3:
        parts = [0, *parts, 0][:3] if len(parts) == 1 else [0, *parts]
    return parts[0] * 3600 + parts[1] * 60 + parts[2]
