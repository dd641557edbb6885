"""Real processes in one process group: start a pair once, let it run many scenarios, read what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from minima.launcher import child_environment, free_port

ROOT = Path(__file__).parents[2]


def start_ranks(
    module: list[str], logs: Path, cwd: Path, world_size: int = 2, accelerator: str = "cpu", per_node: int | None = None
) -> list[subprocess.Popen]:
    """Start `python -m MODULE ARGUMENTS` once for each rank of one process group; each writes `rank-R.log`.

    With `per_node`, the ranks believe to be on nodes of so many.
    """
    per_node = per_node or world_size
    port = free_port()
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % per_node}
        place |= {"LOCAL_WORLD_SIZE": per_node, "LOCAL_SIZE": per_node}  # the second as the deepspeed launcher says it
        environment = child_environment(world_size) | {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        found_by = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"DS_ACCELERATOR": accelerator, "PYTHONPATH": os.pathsep.join(found_by)}
        environment.pop("MINIMA_DRIVER")  # no driver holds the lock for these
        command = [sys.executable, "-m", *module]
        with open(logs / f"rank-{rank}.log", "wb") as log:
            processes.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes


def run_scenarios(
    names: list[str],
    folder: Path,
    world_size: int = 2,
    timeout_seconds: int = 300,
    accelerator: str = "cpu",
    per_node: int | None = None,
) -> dict[str, Any]:
    """Run functions of `scenarios.py` and its neighbours on every rank of one process group.

    Returns:
        What each scenario returned on rank 0, by name.

    Raises:
        AssertionError: a rank failed; carries the end of its output.
    """
    module = ["tests.distributed.scenarios", str(folder), *names]
    await_ranks(start_ranks(module, folder, ROOT, world_size, accelerator, per_node), folder, timeout_seconds)
    return json.loads((folder / "results.json").read_text())


def await_ranks(processes: list[subprocess.Popen], logs: Path, timeout_seconds: int = 300) -> None:
    """Wait until every rank has ended well.

    Raises:
        AssertionError: a rank failed; carries the end of each one's output.
    """
    try:
        codes = [process.wait(timeout=timeout_seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [(logs / f"rank-{rank}.log").read_text()[-3000:] for rank in range(len(processes))]
    assert codes == [0] * len(codes), f"exit codes {codes}\n" + "\n--- next rank ---\n".join(said)
