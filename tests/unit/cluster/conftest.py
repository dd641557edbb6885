"""A Slurm of stand-ins: its commands write down how they were called, and answer what a test says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minima.cluster import saves
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.stages.identity import describe

_STAND_IN = """#!{python}
import json, os, sys, time
from pathlib import Path
folder, name, arguments = Path({folder!r}), Path(sys.argv[0]).name, sys.argv[1:]
token = os.environ.get("HF_TOKEN")
entry = dict(command=name, arguments=arguments, rank=os.environ.get("RANK"), token=token, lead=os.environ.get("LEAD"))
entry["times"], entry["names"] = os.environ.get("SLURM_TIME_FORMAT"), list(os.environ)
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps(entry) + "\\n")
answers = json.loads((folder / "answers.json").read_text())
answer = answers.get(" ".join([name, *arguments[:2]]), answers.get(name, ""))
if name == "sbatch":
    number = sum('"sbatch"' in line for line in (folder / "calls.jsonl").read_text().splitlines())
    if "--fail" in answer and number >= int(answer.split()[1]):
        sys.exit("sbatch: error: invalid partition specified")
    if "--lost" in answer and number == int(answer.split()[1]):
        sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(100 + number)
elif name == "srun":
    if answer.startswith("wait"):  # as ranks that save and leave once they are told
        (folder / "srun.started").touch()
        until = time.monotonic() + 20
        while not (folder / "told").exists() and time.monotonic() < until:
            time.sleep(0.02)
    for path in answer.split()[2:]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    sys.exit(int(answer.split()[1]) if answer else 0)
else:
    if name == "scancel" and "--signal=TERM" in arguments:
        (folder / "told").touch()
    if answer.startswith("error "):
        sys.exit(answer.removeprefix("error "))
    print(answer)
"""
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sacct", "srun")


class FakeSlurm:
    """The stand-ins and what they were told.

    Args:
        folder: holds the commands and what they write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name in COMMANDS:
            path = self.bin / name
            path.write_text(_STAND_IN.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)
        self._answers: dict[str, str] = {}
        self.answer()

    def answer(self, **answers: str) -> None:
        """What commands print from now on (`srun="wait 143"`); `scontrol_show_job` answers `scontrol show job`."""
        self._answers |= {name.replace("_", " "): text for name, text in answers.items()}
        (self.folder / "answers.json").write_text(json.dumps(self._answers))

    def entries(self, command: str) -> list[dict]:
        """How a command was called, oldest first."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["command"] == command]

    def calls(self, command: str) -> list[list[str]]:
        """The arguments of a command's calls."""
        return [entry["arguments"] for entry in self.entries(command)]

    def job(self, script: Path, **environment: str) -> subprocess.Popen:
        """Start a script as slurmd would."""
        told = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", **environment}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return subprocess.Popen(
            ["bash", str(script)], env=inherited | told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    saves._grace_seconds.cache_clear()
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


CORPUS = {
    "name": "corpus",
    "kind": "build_data",
    "sources": [{"embedded": "sotu"}],
    "tokenizer": {"vocabulary_size": 512},
    "sequence_length": 32,
}
SHAPE = {
    "family": "llama",
    "vocabulary_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "max_positions": 32,
}
BASE = {
    "name": "base",
    "kind": "adapt",
    "model": {"random": SHAPE},
    "data": "corpus",
    "batch_sequences": 8,
    "micro_batch_sequences": 1,
    "steps": 100,
    "learning_rate": 1e-3,
}
OUT = {"name": "out", "kind": "export", "model": "base"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe of three stages and a cluster file: 4 ranks for base, 1 for the others."""
    folder = tmp_path / "project"
    folder.mkdir()
    recipe = {"name": "test", "launcher": "torchrun", "stages": [CORPUS, BASE, OUT]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cluster = {"time": "01:00:00", "stages": {"adapt": {"nodes": 2, "ranks_per_node": 2, "cpus_per_task": 3}}}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    monkeypatch.chdir(folder)
    return folder


def finish(run_folder: Path, *names: str) -> None:
    """Leave manifests of stages of `recipe.yaml`, as if they had run."""
    recipe = load_recipe(Path("recipe.yaml"))
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / "recipe.yaml").write_text(resolved_yaml(recipe))
    for name in names:
        folder = run_folder / name
        folder.mkdir(parents=True, exist_ok=True)
        described = describe(recipe, recipe.stage(name), run_folder, {})
        (folder / "manifest.json").write_text(json.dumps(described | {"seconds": 1.0, "metrics": {}}))
