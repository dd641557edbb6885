"""The memory that a container or a job leaves to a process."""

import psutil
import pytest

from minima.stages.host_memory import host_memory_bytes


@pytest.mark.parametrize(
    ("listed", "files", "limit"),
    [
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/memory.max": "4096"}, 4096),
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/step_0/memory.max": "max", "slurm/memory.max": "8192"}, 8192),
        ("0::/\n", {"memory.max": "1000"}, 1000),
        ("5:cpu,memory:/docker/x\n0::/\n", {"memory/docker/x/memory.limit_in_bytes": "512"}, 512),
        ("3:cpu:/docker/x\n", {"docker/x/memory.max": "512"}, None),
        ("", {}, None),
    ],
)
def test_the_smallest_limit_around_the_process_counts(tmp_path, listed, files, limit):
    own = tmp_path / "cgroup"
    own.write_text(listed)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    assert host_memory_bytes(tmp_path / "groups", own) == (limit or psutil.virtual_memory().total)
