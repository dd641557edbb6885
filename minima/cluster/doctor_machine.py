"""The checks of `minima doctor` on one machine: programs, disk, locks, shared memory, Slurm, MPI, the Hub."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from minima.launcher import cleaned_environment, num_accelerators, slurm_job
from minima.stages.manifest import look_again

State = Literal["ok", "warning", "FAILED"]
_PROGRAM_SECONDS = 20  # `scontrol` queries a controller that may be busy
_HUB_SECONDS = 10
_DISK_BYTES = (1 << 30, 50 << 30)  # FAILED below the first, a warning below the second: checkpoints of a small model
_SHM_BYTES = 1 << 30  # containers often have only 64 MiB, too little for NCCL's buffers and data loaders
_SKEW_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: State  # `ok`, `warning` (a run can still work) or `FAILED`
    found: str
    do: str | None = None  # what to do about it; None if it is ok


def guarded(check: str, look: Callable[[], Finding]) -> Finding:
    """Run a check; an exception in it becomes a FAILED finding."""
    try:
        return look()
    except Exception as error:  # a crashed doctor would report nothing at all
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Finding(check, "FAILED", said, "fix the cause of this error, then run the doctor again")


def check_programs() -> list[Finding]:
    """Check Python and the packages that minima cannot run without."""
    version = ".".join(map(str, sys.version_info[:3]))
    python = Finding("Python", "ok", f"{version}, {sys.prefix}")
    return [python, guarded("torch", _torch), guarded("DeepSpeed", lambda: _package("DeepSpeed", "deepspeed"))]


def check_machine(folder: Path) -> list[Finding]:
    """Check everything that concerns the machine as a whole, with `folder` for runs, and not a single rank."""
    look_again(folder)  # it may just have been created on another machine
    disk = guarded("disk", lambda: _disk(folder))
    checks = {
        "locks": lambda: _locks(folder),
        "file times": lambda: _file_times(folder),
        "files": lambda: _files(folder),
        "/dev/shm": _shared_memory,
        "Slurm": _slurm,
        "MPI": _mpi,
        "Hub": _hub,
    }
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):  # the finding about the disk covers it
        del checks["locks"], checks["file times"], checks["files"]
    return [disk, *(guarded(name, look) for name, look in checks.items())]


def _package(check: str, name: str) -> Finding:
    try:
        return Finding(check, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        do = "install minima with its dependencies into this Python's environment: see its README"
        return Finding(check, "FAILED", "not installed", do)


def _torch() -> Finding:
    found = _package("torch", "torch")
    if found.state == "FAILED":
        return found
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
    gpus = num_accelerators()
    text = f"{torch.__version__}, built {build}"
    if gpus and not torch.cuda.is_available():
        do = "install the build of torch for the CUDA version that nvidia-smi shows, or set DS_ACCELERATOR=cpu"
        return Finding("torch", "FAILED", f"{text}; it cannot use the {gpus} GPUs of this machine", do)
    return Finding("torch", "ok", text)


def _disk(folder: Path) -> Finding:
    if not folder.is_dir():
        found = f"{folder} {'is a file' if folder.exists() else 'does not exist'}"
        return Finding("disk", "FAILED", found, "create the folder (mkdir -p), or name another with --folder")
    if not os.access(folder, os.W_OK):
        return Finding("disk", "FAILED", f"{folder} is not writable", "name a folder of yours with --folder")
    free = shutil.disk_usage(folder).free
    text = f"{_size(free)} free in {folder.resolve()}"
    state: State = "FAILED" if free < _DISK_BYTES[0] else "warning" if free < _DISK_BYTES[1] else "ok"
    do = "free some space or use another folder; `minima run RECIPE --dry-run` says how much a run needs"
    return Finding("disk", state, text, None if state == "ok" else do)


def _locks(folder: Path) -> Finding:
    do = "use a folder on a file system with locks (Lustre: mounted with -o flock), or never start two runs in one"
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".minima-doctor-") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("locks", "warning", f"flock does not work in {folder}: {error.strerror}", do)
        with open(file.name, "rb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Finding("locks", "ok", "flock blocks a second writer")
    return Finding("locks", "warning", f"flock in {folder} does not block a second writer", do)


def _file_times(folder: Path) -> Finding:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".minima-doctor-") as file:
        file.write(b"now")
        file.flush()
        before = time.time()
        skew = os.stat(file.name).st_mtime - before
    text = f"the file system's clock differs from this machine's by {abs(skew):.1f} s"
    if abs(skew) > _SKEW_SECONDS:
        do = "synchronise both clocks (chrony or ntpd): file times are misleading"
        return Finding("file times", "warning", text, do)
    return Finding("file times", "ok", f"within {_SKEW_SECONDS:.0f} s of this machine's clock")


def _files(folder: Path) -> Finding:
    """Check what stages rely on: appending to a file, renaming its folder, and reading it back at once."""
    do = "use a local disk or a network file system (NFS, Lustre, GPFS); a mounted bucket is fine for text sources only"
    place = Path(tempfile.mkdtemp(dir=folder, prefix=".minima-doctor-"))
    try:
        (place / "partial").mkdir()
        for written in ("one", "two"):
            with (place / "partial" / "file").open("a", encoding="utf-8") as file:
                file.write(written)
        (place / "partial").rename(place / "final")
        found = (place / "final" / "file").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return Finding("files", "FAILED", f"writing, renaming or reading in {folder} failed: {error}", do)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if found != "onetwo":
        return Finding("files", "FAILED", f"a file in {folder} reads {found!r}, but 'onetwo' was written", do)
    return Finding("files", "ok", "written data is read back, also after a rename")


def _shared_memory() -> Finding:
    usage = shutil.disk_usage("/dev/shm")
    text = f"{_size(usage.free)} free of {_size(usage.total)}"
    if usage.free < _SHM_BYTES:
        do = "enlarge it (docker run --shm-size=8g or --ipc=host), and remove files that dead processes left there"
        return Finding("/dev/shm", "warning", text, do)
    return Finding("/dev/shm", "ok", text)


def _slurm() -> Finding:
    job = slurm_job()
    if shutil.which("scontrol") is None:
        if job is None:
            return Finding("Slurm", "ok", "not installed on this machine")
        do = "jobs are requeued with scontrol: put it on PATH"
        return Finding("Slurm", "warning", f"job {job.job_id}, but no scontrol", do)
    code, said = _ask(["scontrol", "--version"])
    if code:
        do = "set SLURM_CONF if its configuration is elsewhere; without Slurm, use another launcher"
        return Finding("Slurm", "warning", f"installed, but finds no cluster: {said}", do)
    where = f", job {job.job_id} on {job.nodelist}" if job else ""
    return Finding("Slurm", "ok", f"{said.removeprefix('slurm ')}{where}")


def _mpi() -> Finding:
    try:
        mpi4py = metadata.version("mpi4py")
    except metadata.PackageNotFoundError:
        mpi4py = None
    if shutil.which("mpirun") is None:
        return Finding("MPI", "ok", "no mpirun on this machine")
    code, said = _ask(["mpirun", "--version"])
    if code:
        do = "load its module again, or use another launcher"
        return Finding("MPI", "warning", f"mpirun does not run: {said}", do)
    if "Open MPI" not in said:
        return Finding("MPI", "warning", f"{said}", "launch/mpirun.sh needs Open MPI: load its module")
    version = said.removeprefix("mpirun (Open MPI) ")
    if mpi4py is None:
        do = "pip install mpi4py: under mpirun, ranks on several machines find each other through it"
        return Finding("MPI", "warning", f"Open MPI {version} without mpi4py", do)
    return Finding("MPI", "ok", f"Open MPI {version}, mpi4py {mpi4py}")


def _hub() -> Finding:
    from huggingface_hub import constants, get_token

    cache = f"cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "ok", f"not contacted, because HF_HUB_OFFLINE=1; {cache}")
    host = constants.ENDPOINT.rpartition("@")[2].removeprefix("https://")
    do = "run `minima fetch RECIPE` on a machine with network access, and set HF_HUB_OFFLINE=1 here"
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=_HUB_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return Finding("Hub", "warning", f"{host} answers {error.code}; {cache}", do)
    except OSError as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        return Finding("Hub", "warning", f"{host} cannot be reached ({reason}); {cache}", do)
    token = "a token is set" if get_token() else "no token, so no gated models"
    return Finding("Hub", "ok", f"{host} answers; {token}; {cache}")


def _ask(command: list[str]) -> tuple[int, str]:
    """A program's exit code, and the first line of its output or the last line of its errors."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROGRAM_SECONDS, env=cleaned_environment(), check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"{type(error).__name__}"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1 if done.returncode else 0] if lines else f"exit code {done.returncode}"


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
