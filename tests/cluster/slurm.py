"""What tests ask of the development cluster, and what they do to it."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

WAIT_SECONDS = 240  # for anything that a busy machine of two cores may take long for


def wait_for(what: str, look: Callable[[], object], seconds: float = WAIT_SECONDS, state: Callable[[], str] = str):
    """Look until something is there, and give it; say what was waited for otherwise."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, f"no {what} within {seconds} s\n{state()}"
        time.sleep(0.1)
    return found


class Slurm:
    """The cluster of tools/dev_cluster.sh.

    Args:
        conf: its slurm.conf.
        path: to look for programs in.
    """

    def __init__(self, conf: Path, path: str) -> None:
        self.conf, self.folder = conf, conf.parent
        foreign = re.compile(r"(SLURM|SBATCH|SQUEUE)_.*|OMP_NUM_THREADS")
        self.environment = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        self.environment |= {"SLURM_CONF": str(conf), "PATH": path}

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands and give what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        line = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(part.split("=", 1) for part in line.split() if "=" in part)

    def state(self, job: str) -> str:
        """A job's state: RUNNING, PENDING, COMPLETED, ..."""
        return self.job(job)["JobState"]

    def ranks(self, job: str) -> dict[int, int]:
        """Process ids of the ranks of a job that runs, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            said = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
            if said.get(b"SLURM_JOB_ID") != job.encode() or said.get(b"SLURM_CONF") != str(self.conf).encode():
                continue
            if arguments[1:4] == [b"-m", b"minima", b"stage"] and b"SLURM_PROCID" in said:
                found[int(said[b"SLURM_PROCID"])] = int(folder.name)
        return found

    def freeze(self, job: str) -> None:
        """Let a job's ranks stand still, as in a long step, so that a short training is not over before Slurm acts."""
        ranks = self.ranks(job)
        assert ranks, f"job {job} has no ranks"
        for process in ranks.values():
            os.kill(process, signal.SIGSTOP)

    def thaw(self, job: str) -> None:
        """Let them go on."""
        for process in self.ranks(job).values():
            os.kill(process, signal.SIGCONT)

    def stop_node(self, node: str) -> None:
        """End a node's slurmd."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGTERM)

    def crash_node(self, node: str, rank: int) -> None:
        """Kill a node's slurmd, the daemon of the job step there, and its rank.

        Args:
            node: its name.
            rank: process id of the rank on it.
        """
        slurmd = int((self.folder / f"slurmd.{node}.pid").read_text())
        stepd = int(re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{rank}/status").read_text(), re.MULTILINE)[1])
        for process in (slurmd, stepd, rank):
            os.kill(process, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd again."""
        self.call("slurmd", "-N", node)

    def nodes(self) -> dict[str, str]:
        """The nodes' states."""
        lines = self.call("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N %T").splitlines()
        return dict(line.split(maxsplit=1) for line in lines)
