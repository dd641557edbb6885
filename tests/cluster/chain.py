"""One run as a chain of jobs on the two nodes, and what a user sees of it."""

import json
import subprocess
import sys
from pathlib import Path

from tests.cluster.slurm import Slurm, wait_for
from tests.pipeline.test_path import SHAPE, write_text

FOLDER = "my chain's $(touch hit)"  # no shell may read the folder's name
CLUSTER = """
partition: normal
time: 60
signal_lead_seconds: 45
defaults: {nodes: 2, ranks_per_node: 1, cpus_per_task: 1}
stages: {corpus: {array: 2}}
"""
STEPS = 210
RECIPE = f"""
name: chain
stages:
  - name: corpus
    kind: build_data
    sources: [{{path: text/*.jsonl}}]
    tokenizer: {{vocabulary_size: 320}}
    sequence_length: 32
    held_out_fraction: 0.1
  - &teacher
    name: teacher
    kind: adapt
    model: {{random: {SHAPE}}}
    data: corpus
    batch_sequences: 4
    micro_batch_sequences: 2
    steps: 10
    learning_rate: 3e-3
    precision: float32
    log_every_steps: 1
  - name: pruned
    kind: prune
    model: teacher
    data: corpus
    target: {{num_layers: 3, hidden_size: 24, num_heads: 3, intermediate_size: 32}}
    sequences: 8
    micro_batch_sequences: 2
    precision: float32
  - &student
    <<: *teacher
    name: student
    kind: distil
    model: pruned
    teacher: teacher
    steps: {STEPS}
    checkpoint_every_steps: 20
  - {{<<: *student, name: undisturbed}}
  - {{name: quality, kind: evaluate, models: [teacher, pruned, student, undisturbed], teacher: teacher, data: corpus}}
  - {{name: out, kind: export, model: student, dtype: float32}}
"""


class Chain:
    """A user's folder with a recipe, a cluster file and text, from which a run is submitted.

    Args:
        slurm: the cluster.
        folder: an empty folder to work in.
    """

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder, self.run_folder = slurm, folder / FOLDER, folder / FOLDER / "runs" / "chain"
        self.folder.mkdir()
        write_text(self.folder / "text")
        lines = (self.folder / "text" / "a.jsonl").read_text().splitlines(keepends=True)
        for name, part in (("a", lines[:150]), ("b", lines[150:])):  # a file for each job of the array
            (self.folder / "text" / f"{name}.jsonl").write_text("".join(part))
        (self.folder / "chain.yaml").write_text(RECIPE)
        (self.folder / "cluster.yaml").write_text(CLUSTER)

    def minima(self, *arguments: str, code: int = 0) -> str:
        """Run a command of minima where the user works, and give what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "minima", *arguments],
            cwd=self.folder,
            env=self.slurm.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, f"{arguments}: code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self) -> str:
        """`minima submit` of the whole recipe."""
        return self.minima("submit", "chain.yaml", "--cluster", "cluster.yaml")

    def jobs(self) -> list[dict]:
        """All jobs that were ever submitted, in order."""
        return json.loads((self.run_folder / "cluster" / "jobs.json").read_text())["jobs"]

    def job(self, stage: str) -> str:
        """The id of the newest job of a stage."""
        return [job["id"] for job in self.jobs() if job["stage"] == stage][-1]

    def records(self, stage: str) -> list[dict]:
        """A training stage's metrics."""
        path = self.run_folder / stage / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def step(self, stage: str) -> int:
        """The last step that a training stage has logged."""
        return max((record["step"] for record in self.records(stage) if "loss" in record), default=0)

    def marker(self, stage: str, step: int | None = None) -> dict:
        """What a checkpoint says of itself; the newest one for no step."""
        folders = sorted((self.run_folder / stage / "checkpoints").glob("step-*/checkpoint.json"))
        path = folders[-1] if step is None else self.run_folder / stage / f"checkpoints/step-{step:08d}/checkpoint.json"
        return json.loads(path.read_text())

    def finished(self, stage: str) -> bool:
        """Whether a stage has published its manifest."""
        return (self.run_folder / stage / "manifest.json").is_file()

    def logs(self, stage: str) -> str:
        """All that jobs and ranks of a stage have printed."""
        files = sorted((self.run_folder / "logs").glob(f"{stage}-*.log"))
        return "".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in files)

    def described(self) -> str:
        """Where the chain stands, for the message of a test that fails."""
        queue = self.slurm.call("squeue", "--states=all", "--array", "--format=%i %j %T %r %N")
        logs = "".join(self.logs(stage)[-3000:] for stage in ("corpus", "teacher", "pruned", "student", "undisturbed"))
        return f"{queue}\n{self.slurm.nodes()}\n{logs}"

    def wait(self, what: str, look, seconds: float = 240):
        """Wait for something of this chain."""
        return wait_for(what, look, seconds, self.described)

    def wait_step(self, stage: str, step: int) -> int:
        """Wait until a stage has logged a step, and give the last one that it has."""
        self.wait(f"step {step} of {stage}", lambda: self.step(stage) >= step)
        return self.step(stage)
