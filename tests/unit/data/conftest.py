"""A small tokenizer and small texts for the data tests."""

import itertools
import json
from pathlib import Path

import pytest

from minima.assets import read_text_asset
from minima.data.tokenizer import train_sentencepiece, write_tokenizer
from minima.recipe.schema import BuildData


@pytest.fixture(scope="session")
def addresses() -> list[str]:
    """Paragraph-sized pieces of the first addresses: 400 different documents."""
    texts = (record["text"] for record in read_text_asset("sotu"))
    words = itertools.chain.from_iterable(text.split(" ") for text in itertools.islice(texts, 20))
    return [" ".join(itertools.islice(words, 40 + number % 60)) for number in range(400)]


@pytest.fixture(scope="session")
def model(addresses) -> bytes:
    """A SentencePiece model of 512 pieces."""
    return train_sentencepiece(addresses, 512)


@pytest.fixture(scope="session")
def tokenizer(model, tmp_path_factory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(model, folder)
    return folder


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory):
    """Writes texts as JSON lines and gives the path."""
    counter = itertools.count()

    def write(texts, field="text") -> str:
        path = tmp_path_factory.mktemp("source") / f"{next(counter)}.jsonl"
        path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def stage():
    """Makes a build_data stage."""

    def make(*sources, **settings) -> BuildData:
        settings = {
            "tokenizer": "tokenizer",
            "sequence_length": 32,
            "held_out_fraction": 0.1,
            "processes": 1,
        } | settings
        return BuildData(name="corpus", kind="build_data", sources=list(sources), **settings)

    return make
