"""The settings of an expand_vocabulary stage."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from minima.errors import RecipeError
from minima.recipe.base import ModelInput, Stage, Strict, as_model
from minima.recipe.data import Source


class DonorTraining(Strict):
    """A donor tokenizer that is trained here; of the same kind as the base tokenizer.

    Attributes:
        vocabulary_size: number of pieces, including byte fallback and control pieces. At most half of them are single
            characters.
        sources: the text to train on; its held-out documents are left out.
        max_characters: train on at most this many characters.
    """

    vocabulary_size: int = Field(gt=259)
    sources: list[Source] = Field(min_length=1)
    max_characters: int = Field(default=100_000_000, gt=0)


class ExpandVocabulary(Stage):
    """Merge another tokenizer's pieces into the model's own, and grow the model's embedding and head to match.

    Attributes:
        model: the model to grow.
        tokenizer: the base tokenizer: an earlier stage, a folder or a Hub id; the model's own when not given.
        donor: where the new pieces come from: a `tokenizer.model` or `tokenizer.json` file, a folder that holds one, a
            Hub id, or how to train one. It must be of the base's kind: SentencePiece BPE, or byte-level BPE.
        script: take only pieces with a character of this script (for Han and Kana, also punctuation that occurs only in
            East Asian text), so that text without such characters keeps its tokens. When not given, all pieces are
            taken; then neighbouring old tokens of any text may become one new token.
        count_on: text on which the donor's pieces are counted; the most frequent come first. Its held-out documents are
            left out. When not given, pieces come in the donor's own order.
        minimum_count: pieces rarer than this are left out, unless another piece needs them or rows must be filled. When
            not given: 1, or no minimum with a `size`, since a row that exists anyway is better used by a rare piece
            than by none.
        size: number of rows of the grown embedding, a multiple of `multiple`. When not given, enough for every piece
            that passes the filters, rounded up. A piece is only added with the smaller pieces it is merged from.
        multiple: the number of rows is a multiple of this. Rows are filled with real pieces first; the rest are
            reserved rows, which belong to no token.
        report_on: text on whose held-out documents tokens per character are reported, before and after, per source.
        held_out_fraction: fraction of documents held out of `donor`, `count_on` and `report_on`, by a hash of their
            text.
        seed: seed of that hash.
    """

    kind: Literal["expand_vocabulary"]
    model: ModelInput
    tokenizer: str | None = None
    donor: str | DonorTraining
    script: Literal["han", "hiragana", "katakana", "hangul", "cyrillic", "arabic", "greek", "latin"] | None = None
    count_on: list[Source] = []
    minimum_count: int | None = Field(default=None, ge=0)
    size: int | None = Field(default=None, gt=0)
    multiple: int = Field(default=64, gt=0)
    report_on: list[Source] = []
    held_out_fraction: float = Field(default=0.01, gt=0, lt=1)
    seed: int = 776

    _coerce_model = field_validator("model", mode="before")(as_model)

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        where = f"expand_vocabulary stage {self.name!r}"
        if self.size is not None and self.size % self.multiple:
            near = self.size // self.multiple * self.multiple
            raise RecipeError(
                f"{where} has size {self.size}, which is not a multiple of {self.multiple}",
                "rows that do not divide evenly are slow on every GPU, and some numbers of GPUs cannot share them",
                f"choose {near} or {near + self.multiple}, or another `multiple`",
            )
        if self.minimum_count is not None and not self.count_on:
            raise RecipeError(
                f"{where} gives a minimum_count but no count_on",
                "without text to count on, it would have no effect",
                "give sources in `count_on`, or leave minimum_count out",
            )
        if self.model.random is not None and self.tokenizer is None:
            raise RecipeError(
                f"{where} starts from random weights but names no tokenizer",
                "random weights have no tokenizer of their own to add pieces to",
                "name the stage or the folder of one (`tokenizer:`)",
            )
        return self
