"""Which rows of two models are compared: those beyond the shorter vocabulary must be of no token."""

import logging

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minima.errors import VocabularyMismatch
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource
from minima.stages.origin import Origin
from minima.stages.vocabularies import cut, shared_rows


@pytest.fixture
def model(tmp_path):
    """Makes a model of some rows whose tokenizer has some ids, or that has none."""

    def model(rows: int, ids: int | None, name: str) -> Origin:
        shape = ModelShape(vocabulary_size=rows, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
        if ids is not None:
            words = {str(number): number for number in range(ids)}
            backend = Tokenizer(models.WordLevel(words, unk_token="0"))
            PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="0").save_pretrained(tmp_path / name)
        return Origin(RandomSource(shape.to_config(), 0), name, None if ids is None else tmp_path / name)

    return model


@pytest.mark.parametrize(
    "sizes", [((20, 18), (24, 18)), ((24, 18), (20, 18)), ((20, 18), (20, 17)), ((24, 20), (20, None))]
)
def test_rows_of_no_token_are_left_out(model, sizes, caplog):
    caplog.set_level(logging.INFO, "minima")
    student, teacher = model(*sizes[0], "student"), model(*sizes[1], "teacher")
    rows = shared_rows(student, teacher)
    assert rows == 20
    kept = [cut(each, rows) for each in (student, teacher)]
    assert [each.source.config["vocab_size"] for each in kept] == [20, 20]
    for before, after in zip((student, teacher), kept, strict=True):
        longer = before.source.config["vocab_size"] == 24
        assert (after is before) is not longer
        assert (f"{before.identity}: the last 4 of its 24 vocabulary rows" in caplog.text) is longer


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (((20, 18), (24, 21)), "teacher has 21 tokens in 24 vocabulary rows, but student has 20"),
        (((24, 24), (20, 18)), "student has 24 tokens in 24 vocabulary rows"),
        (((24, None), (20, 18)), "student has 24 tokens in 24 vocabulary rows"),
    ],
)
def test_rows_of_tokens_are_not(model, sizes, words):
    with pytest.raises(VocabularyMismatch, match=words):
        shared_rows(model(*sizes[0], "student"), model(*sizes[1], "teacher"))


def test_nor_are_rows_that_nothing_tells_of(model):
    teacher = model(24, 18, "teacher")
    (teacher.tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(
        VocabularyMismatch, match=r"(?s)teacher has 24 vocabulary rows.* 20 \(no tokenizer can.*do it so"
    ):
        shared_rows(model(20, 18, "student"), teacher, "do it so")
    (teacher.tokenizer / "tokenizer.json").unlink()  # of what is left, transformers would make one without words
    with pytest.raises(VocabularyMismatch, match=r"student has 20 \(\S+ holds no tokenizer"):
        shared_rows(model(20, 18, "student"), teacher)
