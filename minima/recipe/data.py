"""Where text comes from, and how a tokenizer is made from it."""

import glob
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from minima.errors import RecipeError
from minima.recipe.base import Strict

_OF_HUB = ("config", "split", "revision", "streaming")
# Keys without effect, by where the documents come from.
_IDLE = {"path": _OF_HUB, "hub": ("format",), "embedded": (*_OF_HUB, "format", "field")}


class Source(Strict):
    """Documents from one place. Give exactly one of `path`, `hub` and `embedded`.

    Attributes:
        name: what reports call the source; derived from `path`, `hub` or `embedded` when not given.
        path: a file, a folder, or a pattern with `*`, relative to where the command runs; `~` is the home folder. Files
            are read in sorted order.
        hub: a Hugging Face dataset: a Hub id, or a folder that `datasets` saved.
        embedded: data that ships with minima: the texts `sotu` (English) and `poems` (Chinese), the conversations
            `chat` and the preference pairs `preferences` (both in both languages).
        config: configuration of the dataset; `config`, `split`, `revision` and `streaming` are for `hub` only.
        split: split of the dataset.
        revision: revision of the dataset.
        streaming: read the dataset without downloading it first.
        format: format of the files in `path`; `auto` goes by their names: a `.json` is one array of records, or JSON
            lines. A plain text file is one document. All but parquet may be compressed: `.gz`, `.xz`, `.bz2`, `.zst`
            (the last with windows of up to 128 MB, that is, by `zstd` without `--long` above 27).
        field: the key that holds the text in the records of `path` or `hub`. Not used for conversations and
            preferences, whose layout is recognised from the record.
        weight: share of the training tokens, relative to the other sources' weights. If no source has a weight, every
            token is read once; otherwise a source without one counts as 1. A source that runs out before its share is
            reached starts again, and the report counts the epochs.
        max_documents: read at most this many.
    """

    name: str | None = None
    path: str | None = None
    hub: str | None = None
    embedded: Literal["sotu", "poems", "chat", "preferences"] | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    field: str = "text"
    weight: float | None = Field(default=None, gt=0)
    max_documents: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("path", "hub", "embedded") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(
                f"a source gives {' and '.join(given) or 'none of path, hub and embedded'}",
                "the documents of a source come from one place",
                "give exactly one of `path`, `hub` and `embedded`",
            )
        self._refuse_idle(given[0])
        return self

    def _refuse_idle(self, origin: str) -> None:
        fields = type(self).model_fields  # a finished run's recipe writes its defaults out: those count as not given
        idle = [name for name in _IDLE[origin] if getattr(self, name) != fields[name].default]
        if idle:
            raise RecipeError(
                f"source {self.label!r} sets {', '.join(idle)}, which {'are' if len(idle) > 1 else 'is'} not used with "
                f"`{origin}`",
                "the text that is read would not be what the recipe seems to say",
                f"leave {'them' if len(idle) > 1 else 'it'} out; config, split, revision and streaming are for `hub`, "
                "format for `path`, field for both",
            )

    @property
    def label(self) -> str:
        """The name of the source in reports."""
        return self.name or self.embedded or self.hub or str(self.path)

    def files(self) -> list[Path]:
        """The files of `path` on this machine in reading order: sorted, without hidden ones of a folder or pattern.

        Returns:
            The file itself, all below a folder, or all that match a pattern (`**` crosses folders); none for a source
            without `path`.
        """
        path = Path(self.path).expanduser() if self.path is not None else None
        if path is None or path.is_file():
            return [path] if path else []
        if path.is_dir():
            return files_below(path)
        found = (Path(name) for name in glob.glob(str(path), recursive=True))
        return sorted((file for file in found if file.is_file()), key=Path.as_posix)


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones and those in hidden folders."""
    below = [file for file in folder.rglob("*") if file.is_file()]
    shown = [file for file in below if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return sorted(shown, key=Path.as_posix)


class TokenizerTraining(Strict):
    """A SentencePiece BPE tokenizer to train on the training documents of the stage's own sources.

    Attributes:
        vocabulary_size: number of pieces, including byte fallback and control pieces.
        sources: names of the sources to train on; all when not given.
        max_characters: train on at most this many characters; documents are taken in a seeded random order.
    """

    vocabulary_size: int = Field(gt=259, description="three control pieces and 256 bytes come first")
    sources: list[str] | None = None
    max_characters: int = Field(default=100_000_000, gt=0)
