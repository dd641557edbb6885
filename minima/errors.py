"""Errors that are the user's to mend. Each says what is wrong, why it matters and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

ADVICE = "  what to do: "  # begins the last line that an error prints of itself


def first_line(error: BaseException) -> str:
    """What an error of a library says first, at most 300 characters; its class where it says nothing.

    A first line that ends with a colon goes on in the next ones.
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    text = lines[0] if not lines[0].rstrip().endswith(":") else " ".join(" ".join(lines).split())
    return text[:300]


class MinimaError(ValueError):
    """A mistake in a recipe, an input or the machine, told so that it can be mended.

    Args:
        what: what is wrong, with the value that was seen.
        why: why it matters, that is, what would happen if it were let through.
        do: what to do about it.
    """

    def __init__(self, what: str, why: str, do: str) -> None:
        super().__init__(f"{what}\n  why it matters: {why}\n{ADVICE}{do}")
        self.what, self.why, self.do = what, why, do

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.do)


class Stopped(Exception):
    """A signal asked the run to end, and it did, with nothing lost. Not a mistake: the same command goes on.

    Args:
        signal: its number; the process's exit code is 128 more.
        where: what is saved: `stage student after step 120`.
    """

    def __init__(self, signal: int, where: str) -> None:
        super().__init__(f"stopped by signal {signal}: {where} is saved, and the same command goes on from there")
        self.signal, self.where = signal, where


class LostRank(Exception):
    """Another rank has ended in the midst of something to be done together. That one knows why; this one does not.

    Args:
        said: what the connection's library said.
    """

    def __init__(self, said: str) -> None:
        super().__init__(
            f"the connection to another rank was lost ({said}): that rank has ended, or its machine or the network "
            "has failed; where it says why itself, that is elsewhere in the log. The same command goes on from what "
            "is saved"
        )


class RecipeError(MinimaError):
    """A recipe that cannot be read, or that asks for something impossible."""


class DataError(MinimaError):
    """Input text that is missing, empty or unreadable."""


class StoreCorrupted(MinimaError):
    """A token store or checkpoint file whose bytes are not those that were written."""


class TokenizerMismatch(MinimaError):
    """A tokenizer and a model, or two tokenizers, that do not belong together."""


class VocabularyMismatch(MinimaError):
    """Two models over different tokens where they have to be over the same."""

    DO = "start the student from a pruned teacher, or give both models one tokenizer (`expand_vocabulary`)"


class ShapeError(MinimaError):
    """A model shape that cannot be built, or that cannot be cut from the model it should come from."""


class UnsupportedFamily(MinimaError):
    """A model family whose heads, neurons and norms are not known here."""


class DeepSpeedConfigError(MinimaError):
    """A DeepSpeed JSON that sets what the recipe owns, or a batch that its ranks cannot share."""


class LauncherError(MinimaError):
    """Rank, world size or master address that are missing, partial or impossible."""


class StageError(MinimaError):
    """A stage folder that belongs to another recipe, or an input that is missing or has changed."""


class FileFailed(StageError):
    """A file that a disk or a file server failed to read or write, or that was moved; perhaps the fault of a node."""


class CheckpointError(MinimaError):
    """A checkpoint that is missing, incomplete or not this model's."""


class OutOfMemory(MinimaError):
    """A device, or a machine, that has no memory left."""


class NotFinite(MinimaError):
    """A loss or a gradient that is infinite or not a number."""


class RankHung(MinimaError):
    """A rank that no longer comes further, while the others wait for it."""


class DiskFull(MinimaError):
    """No space left where a stage writes."""


class AccessRefused(MinimaError):
    """A file that the operating system lets nobody, or not this user, read or write."""


class ClusterError(MinimaError):
    """A cluster file that cannot be used, or a scheduler that refuses."""


class TableError(MinimaError):
    """A table of results, or a fit to one, that no law can be fitted to or read from."""


@contextmanager
def stage_named(name: str) -> Iterator[None]:
    """Let what is refused inside begin with `stages.NAME`, where it does not say so itself."""
    try:
        yield
    except MinimaError as error:
        if error.what.startswith((f"stages.{name}:", f"stages.{name}.")):
            raise
        raise type(error)(f"stages.{name}: {error.what}", error.why, error.do) from None
