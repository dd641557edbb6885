"""What is no error of a stage's own: no memory left, a refused file, another rank that has ended. No torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from minima.disk import is_refused_file, refused_file_advice
from minima.errors import FileFailed, LostRank, OutOfMemory
from minima.recipe.references import uses_ranks
from minima.recipe.schema import AnyStage, AnyTraining, Distil, Prune

# What PyTorch's allocators, CUDA, NCCL and cuBLAS say of memory, in errors of several types.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")
_NOT_MEMORY = "static tls block"  # a library that was loaded too late
# What gloo, NCCL and PyTorch's key-value store say where whoever was at the other end is there no more.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "remote process exited",
    "ncclremoteerror",
    "connection was likely closed",
)
IMPORTANCE_IN_LESS = (
    "give more ranks, or a `deepspeed:` JSON of your own with less stage3_max_live_parameters and "
    "stage3_prefetch_bucket_size; less micro_batch_sequences or sequence_length help, too, but the score depends on "
    "them"
)
_GLOO = r"^\[\S+:\d+\] "  # a place in its source
_ADVICE_BEGINS = ("If reserved but unallocated", "See documentation")  # PyTorch's own, which follows the figures


@contextmanager
def machine_errors_named(stage: AnyStage, ranks: int = 1) -> Iterator[None]:
    """Around a stage.

    Args:
        stage: that runs.
        ranks: that it runs on; one alone loses none.

    Raises:
        OutOfMemory: what ran in it found no memory left.
        FileFailed: the operating system refused a file, for another reason than space or permission.
        LostRank: another rank has ended, so that nothing came of what was to be done together.
    """
    try:
        yield
    except Exception as error:
        said = str(error).lower()
        if _is_out_of_memory(error, said):
            raise OutOfMemory(
                f"stages.{stage.name}: {_figures(error)}",
                "the stage needs more memory than there is; what it has saved stays, and it goes on from there",
                _ways_out(stage),
            ) from error
        if is_refused_file(error):
            raise FileFailed(
                f"stages.{stage.name}: {error}",
                "the operating system refused a file that the stage reads or writes; what the stage has saved stays",
                f"{refused_file_advice(error)}, then run the same command again: it continues from what is saved",
            ) from error
        if ranks > 1 and _is_of_ranks(error, said) and any(text in said for text in _LOST):
            raise LostRank(_first_line(error)) from error
        raise


def _is_out_of_memory(error: BaseException, said: str) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    of_libraries = isinstance(error, RuntimeError | OSError) and _NOT_MEMORY not in said
    return of_libraries and any(text in said for text in _NO_MEMORY)


def _is_of_ranks(error: BaseException, said: str) -> bool:
    """Whether it came from what connects ranks, and not, say, from a download."""
    of_torch = type(error).__name__.startswith("Dist") or "nccl" in said or re.match(_GLOO, str(error)) is not None
    return isinstance(error, RuntimeError) and of_torch


def _first_line(error: BaseException) -> str:
    """Without the place in gloo's source that it begins with, and gloo's advice."""
    line = next(iter(str(error).splitlines()), "")
    return re.sub(_GLOO, "", line).partition("This is typically")[0].rstrip(" .")


def _figures(error: BaseException) -> str:
    said = " ".join(str(error).split()) or "no memory left"
    for text in _ADVICE_BEGINS:
        said = said.partition(text)[0]
    return said.rstrip(" .")


def _ways_out(stage: AnyStage) -> str:
    if isinstance(stage, Prune):
        return IMPORTANCE_IN_LESS
    if not isinstance(stage, AnyTraining):
        fewer = next((key for key in ("micro_batch_sequences", "batch_size", "processes") if hasattr(stage, key)), "")
        more = "take more ranks" if uses_ranks(stage) else "take a machine with more memory"
        return f"lower {fewer}, or {more}" if fewer else more
    ways = []
    if stage.micro_batch_sequences > 1:
        ways.append("lower micro_batch_sequences, which leaves the batch as it is")
    if stage.activation_checkpointing != "full":
        taken = " (unless `auto` has taken that)" if stage.activation_checkpointing == "auto" else ""
        ways.append(f"set activation_checkpointing: full{taken}")
    if stage.deepspeed != "student_zero3_offload.json":
        ways.append("keep the optimiser in the hosts' memory with deepspeed: student_zero3_offload.json")
    if isinstance(stage, Distil) and stage.teacher.offload == "none":
        ways.append("keep the teacher there with teacher.placement: zero3_node and teacher.offload: cpu")
    return ", ".join([*ways, "or take more ranks"]) + "; `minima plan` says what fits on which GPUs"
