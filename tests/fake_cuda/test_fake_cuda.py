"""What the code does with CUDA tensors, on a machine without a GPU: devices, dtypes, and where the host would wait."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The device that is not there."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    lacks = "a C++ compiler" if shutil.which("g++") is None else "a CPU build of PyTorch" if torch.version.cuda else ""
    if lacks:
        assert "CI" not in os.environ, f"continuous integration needs {lacks}"
        pytest.skip(f"this needs {lacks}")

    path = tmp_path_factory.mktemp("device") / "device.so"
    folders = [f"-I{folder}" for folder in include_paths()]
    folders += [flag for folder in library_paths() for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    subprocess.run(
        ["g++", "-std=c++20", "-fPIC", "-shared", HERE / "device.cpp", "-o", path, *folders, "-ltorch_cpu", "-lc10"],
        check=True,
    )
    return path


def run(library: Path, root: Path, cases: str) -> dict[str, list[str]]:
    """The places where the host waits, by case; fails if a case has failed."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda.cases", library, cases], cwd=root, capture_output=True, text=True
    )
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert ended.returncode == 0 and found, f"after {len(found)} cases: {ended.stderr[-3000:]}"
    failed = [f"{case['name']}:\n{case['error']}" for case in found if case["error"]]
    assert not failed, f"{len(failed)} of {len(found)} cases failed; the first: {failed[0]}"
    return {case["name"]: case["waits"] for case in found}


def test_losses_stay_on_the_gpu_and_never_wait_for_it(library, root):
    assert not {name: places for name, places in run(library, root, "losses").items() if places}


def test_a_step_waits_for_the_gpu_only_where_ranks_exchange_their_votes(library, root):
    votes = ["train_step: a copy from cpu to cuda", "train_step: _local_scalar_dense"]
    assert not {name: places for name, places in run(library, root, "steps").items() if places != votes}
