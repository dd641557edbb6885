"""Recognises failures that are not the stage's fault (out of memory, a refused file, a lost rank). No torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from minima.disk_errors import is_refused_file, refused_file_advice
from minima.errors import FileFailed, LostRank, OutOfMemory
from minima.recipe.references import uses_ranks
from minima.recipe.schema import AnyStage, AnyTraining, Distil, Prune

# Out-of-memory messages of PyTorch's allocators, CUDA, NCCL and cuBLAS, in errors of several types.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")
_NOT_MEMORY = "static tls block"  # "cannot allocate memory" because a library was loaded too late
# Messages of gloo, NCCL and PyTorch's key-value store when the peer is gone.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "remote process exited",
    "ncclremoteerror",
    "connection was likely closed",
)
IMPORTANCE_IN_LESS = (
    "use more ranks, or your own `deepspeed:` JSON with lower stage3_max_live_parameters and "
    "stage3_prefetch_bucket_size; lower micro_batch_sequences or sequence_length also help, but the score depends on "
    "them"
)
_GLOO = r"^\[\S+:\d+\] "  # gloo's source location at the start of a message
_ADVICE_BEGINS = ("If reserved but unallocated", "See documentation")  # start of PyTorch's advice after the figures


@contextmanager
def machine_errors_named(stage: AnyStage, ranks: int = 1) -> Iterator[None]:
    """Wrap a stage to translate errors of the machine.

    Args:
        ranks: how many ranks it runs on; a single one cannot lose another.

    Raises:
        OutOfMemory: the stage ran out of memory.
        FileFailed: the operating system refused a file, for another reason than space or permission.
        LostRank: another rank has ended, so that a collective operation failed.
    """
    try:
        yield
    except Exception as error:
        said = str(error).lower()
        if _is_out_of_memory(error, said):
            raise OutOfMemory(
                f"stages.{stage.name}: {_figures(error)}",
                "the stage needs more memory than there is; what it has saved is kept, and it resumes from there",
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
    """Whether the error came from the communication between ranks, and not, for example, from a download."""
    of_torch = type(error).__name__.startswith("Dist") or "nccl" in said or re.match(_GLOO, str(error)) is not None
    return isinstance(error, RuntimeError) and of_torch


def _first_line(error: BaseException) -> str:
    """The error's first line without gloo's source location at its start and gloo's advice at its end."""
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
        more = "use more ranks" if uses_ranks(stage) else "use a machine with more memory"
        return f"lower {fewer}, or {more}" if fewer else more
    ways = []
    if stage.micro_batch_sequences > 1:
        ways.append("lower micro_batch_sequences, which does not change the batch size")
    if stage.activation_checkpointing != "full":
        taken = " (unless `auto` has chosen that)" if stage.activation_checkpointing == "auto" else ""
        ways.append(f"set activation_checkpointing: full{taken}")
    if stage.deepspeed != "student_zero3_offload.json":
        ways.append("keep the optimiser in host memory with deepspeed: student_zero3_offload.json")
    if isinstance(stage, Distil) and stage.teacher.offload == "none":
        ways.append("keep the teacher in host memory with teacher.placement: zero3_node and teacher.offload: cpu")
    return ", ".join([*ways, "or use more ranks"]) + "; `minima plan` says what fits on which GPUs"
