"""Errors that the user can fix. Each says what is wrong, why it matters and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

ADVICE = "  what to do: "  # starts the last line of a printed error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; the name of its class if the message is empty.

    If the first line ends with a colon, the following lines are joined to it.
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    text = lines[0] if not lines[0].rstrip().endswith(":") else " ".join(" ".join(lines).split())
    return text[:300]


class MinimaError(ValueError):
    """A problem with a recipe, an input or the machine, described so that the user can fix it.

    Args:
        what: what is wrong, with the offending value.
        why: why it matters, that is, what would happen otherwise.
        do: what to do about it.
    """

    def __init__(self, what: str, why: str, do: str) -> None:
        super().__init__(f"{what}\n  why it matters: {why}\n{ADVICE}{do}")
        self.what, self.why, self.do = what, why, do

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.do)


class Stopped(Exception):
    """The run stopped because of a signal, with nothing lost. Not a mistake: the same command resumes it.

    Args:
        signal: the signal's number; the process's exit code is 128 + this number.
        where: what was saved, such as `stage student after step 120`.
    """

    def __init__(self, signal: int, where: str) -> None:
        super().__init__(f"stopped by signal {signal}: {where} is saved, and the same command resumes from there")
        self.signal, self.where = signal, where


class LostRank(Exception):
    """Another rank ended during a collective operation. Only that rank knows why.

    Args:
        said: the message of the communication library.
    """

    def __init__(self, said: str) -> None:
        super().__init__(
            f"the connection to another rank was lost ({said}): that rank has ended, or its machine or the network "
            "has failed; if it reported a reason, that is elsewhere in the log. The same command resumes from what "
            "is saved"
        )


class RecipeError(MinimaError):
    """A recipe that cannot be read, or that asks for something impossible."""


class DataError(MinimaError):
    """Input text that is missing, empty or unreadable."""


class StoreCorrupted(MinimaError):
    """A token store or checkpoint file whose bytes differ from what was written."""


class TokenizerMismatch(MinimaError):
    """A tokenizer and a model, or two tokenizers, that do not belong together."""


class VocabularyMismatch(MinimaError):
    """Two models with different vocabularies where they must share one."""

    DO = "start the student from a pruned teacher, or give both models one tokenizer (`expand_vocabulary`)"


class ShapeError(MinimaError):
    """A model shape that cannot be built, or that cannot be pruned from the given model."""


class UnsupportedFamily(MinimaError):
    """A model family whose layout of heads, neurons and norms minima does not know."""


class DeepSpeedConfigError(MinimaError):
    """A DeepSpeed JSON that cannot be read, sets what the recipe owns, or asks for what minima does not support."""


class LauncherError(MinimaError):
    """Launcher variables (rank, world size, master address) that are missing, incomplete or impossible."""


class StageError(MinimaError):
    """A stage folder that belongs to another recipe, or an input that is missing or has changed."""


class FileFailed(StageError):
    """A file that a disk or a file server failed to read or write, or that was moved; perhaps the fault of a node."""


class CheckpointError(MinimaError):
    """A checkpoint that is missing, incomplete or of another model."""


class OutOfMemory(MinimaError):
    """A device or a machine that has run out of memory."""


class NotFinite(MinimaError):
    """A loss or a gradient that is infinite or not a number."""


class RankHung(MinimaError):
    """A rank that makes no progress while the others wait for it."""


class DiskFull(MinimaError):
    """No space left on the disk that a stage writes to."""


class AccessRefused(MinimaError):
    """A file that this user is not allowed to read or write."""


class ClusterError(MinimaError):
    """An unusable cluster file, or a refusal by the scheduler."""


class TableError(MinimaError):
    """A table of results that no law can be fitted to, or a fit that cannot be used."""


@contextmanager
def stage_named(name: str) -> Iterator[None]:
    """Prefix errors raised inside the block with `stages.NAME`, unless they already have that prefix."""
    try:
        yield
    except MinimaError as error:
        if error.what.startswith((f"stages.{name}:", f"stages.{name}.")):
            raise
        raise type(error)(f"stages.{name}: {error.what}", error.why, error.do) from None
