"""A small tokenizer and small texts for the data tests."""

import itertools
import json
from pathlib import Path

import pytest

from minima.assets import read_text_asset
from minima.data.piece_training import train_sentencepiece
from minima.data.tokenizer import load_tokenizer, save_tokenizer, write_tokenizer
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
def beginning(tokenizer, tmp_path_factory) -> Path:
    """The same tokenizer as Llama's own files have it: a text begins with its begin token."""
    from tokenizers import processors

    folder = tmp_path_factory.mktemp("beginning")
    loaded = load_tokenizer(tokenizer)
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", loaded.bos_token_id)]
    )
    save_tokenizer(loaded, tokenizer, folder)
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


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Path:
    """A byte-level BPE with ChatML's special tokens, as Qwen and SmolLM have it; no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [record["text"][:2000] for record in itertools.islice(read_text_asset("sotu"), 40)]
    texts += [record["text"] for record in itertools.islice(read_text_asset("poems"), 200)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("byte-level")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder
