"""What is the machine's is not told as an error of ours; what libraries say of it is in their own words here."""

import pytest
import torch

from minima.errors import FileFailed, LostRank, OutOfMemory
from minima.recipe.schema import Recipe
from minima.stages.machine_errors import machine_errors_named

CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 512.00 MiB is "
    "free. Including non-PyTorch memory, this process has 78.60 GiB memory in use. Of the allocated memory 77.02 GiB "
    "is allocated by PyTorch, and 214.10 MiB is reserved by PyTorch but unallocated. If reserved but unallocated "
    "memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
    "documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
NCCL = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
TRAINING = {"model": "base", "data": "text", "batch_sequences": 64, "steps": 10, "learning_rate": 1e-3}


def stage(**settings):
    recipe = Recipe.model_validate({"name": "run", "stages": [{"name": "x"} | settings]})
    return recipe.stages[0]


def said(settings: dict, error: Exception) -> OutOfMemory:
    with pytest.raises(OutOfMemory) as caught, machine_errors_named(stage(**settings)):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


@pytest.mark.parametrize(
    ("error", "figures"),
    [
        (torch.OutOfMemoryError(CUDA), "x: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total"),
        (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "cublasCreate"),
        (RuntimeError(NCCL), "Cuda failure 2 'out of memory'"),
        (OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
        (MemoryError(), "no memory left"),
    ],
    ids=["torch", "CUDA", "cuBLAS", "NCCL", "the system", "Python"],
)
def test_it_is_known_from_what_libraries_say(error, figures):
    assert figures in said({"kind": "evaluate", "models": ["base"], "data": "text"}, error).what


def test_a_processors_memory_is_known_by_what_pytorch_really_says():
    evaluate = stage(kind="evaluate", models=["base"], data="text")
    with pytest.raises(OutOfMemory, match=f"you tried to allocate {2**62} bytes"), machine_errors_named(evaluate):
        torch.empty(2**60)


def test_pytorchs_own_advice_is_left_out_for_the_stages():
    assert said({"kind": "evaluate", "models": ["base"], "data": "text"}, torch.OutOfMemoryError(CUDA)).what.endswith(
        "is reserved by PyTorch but unallocated"
    )


@pytest.mark.parametrize(
    ("settings", "named", "unnamed"),
    [
        (
            {"kind": "distil", "teacher": "base", "micro_batch_sequences": 2, **TRAINING},
            ["micro_batch_sequences", "checkpointing: full", "student_zero3_offload", "teacher.offload: cpu"],
            [],
        ),
        (
            {
                "kind": "adapt", "micro_batch_sequences": 1, "activation_checkpointing": "full",
                "deepspeed": "student_zero3_offload.json", **TRAINING,
            },
            ["use more ranks", "minima plan"],
            ["micro_batch_sequences", "activation_checkpointing", "offload"],
        ),
        ({"kind": "prune", "model": "base", "data": "text", "target": {"sparsity": 50}}, ["max_live_parameters"], []),
        ({"kind": "evaluate", "models": ["base"], "data": "text"}, ["lower micro_batch_sequences"], []),
        ({"kind": "export", "model": "base"}, ["more ranks"], ["lower"]),
        ({"kind": "benchmark", "model": "base", "tasks": ["t"]}, ["lower batch_size", "more memory"], ["ranks"]),
    ],
)  # fmt: skip
def test_the_ways_out_are_those_that_the_stage_has(settings, named, unnamed):
    ways = said(settings, torch.OutOfMemoryError("CUDA out of memory.")).do
    assert all(text in ways for text in named), ways
    assert not any(text in ways for text in unnamed), ways


@pytest.mark.parametrize(
    "said",
    [
        "[pair.cc:553] Connection closed by peer [::1]:162. This is typically caused by a remote worker crashing.",
        "NCCL error in: NCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.27.5\nLast:",
    ],
)
def test_a_rank_that_loses_another_says_so(said):
    with pytest.raises(LostRank) as caught, machine_errors_named(stage(kind="export", model="base"), ranks=2):
        raise RuntimeError(said)
    told = (
        said.splitlines()[0]
        .removeprefix("[pair.cc:553] ")
        .removesuffix(". This is typically caused by a remote worker crashing.")
    )
    assert str(caught.value).startswith(f"the connection to another rank was lost ({told}): ")


def test_a_refused_file_is_told_with_its_stage(tmp_path):
    with pytest.raises(FileFailed) as caught, machine_errors_named(stage(kind="export", model="base")):
        (tmp_path / "gone" / "scores.partial").write_text("")
    path = tmp_path / "gone" / "scores.partial"
    assert caught.value.what == f"stages.x: [Errno 2] No such file or directory: '{path}'"
    for error in (OSError(5, "Input/output error"), Exception("Is a directory (os error 21)")):
        with pytest.raises(FileFailed, match=r"^stages\.x: "), machine_errors_named(stage(kind="export", model="base")):
            raise error


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CAS service error: Connection reset by peer (os error 104)"),  # a download
        RuntimeError("shapes do not fit"),
        ValueError("out of memory"),
        OSError(28, "No space left on device", "a"),
        PermissionError(13, "Permission denied", "a"),
        TypeError("ours"),
        OSError("libgomp.so: cannot allocate memory in static TLS block"),
    ],
)
def test_other_errors_stay_what_they_are(error, ranks):
    with pytest.raises(type(error)) as caught, machine_errors_named(stage(kind="export", model="base"), ranks):
        raise error
    assert caught.value is error
