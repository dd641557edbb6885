"""A grown model predicts old tokens as before, and each new row is the mean of its old ones, read whole or in parts.

A cut one predicts what is left of them as before.
"""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from minima.models.causal_lm import load_plain
from minima.models.embeddings import CutSource, GrownSource
from minima.models.shape import ModelShape
from minima.models.weights import FolderSource, RandomSource, write_folder

ROWS, USED, SIZE = 20, 18, 32  # two rows of the model are its padding
ORIGINS = [[0], [1, 2], [3, 3, 17], [5, 6, 7, 8]]
SHAPES = {
    "llama": ModelShape(vocabulary_size=ROWS, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2),
    "tied": ModelShape(vocabulary_size=ROWS, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, tied=True),
    "gpt2": ModelShape(
        family="gpt2", vocabulary_size=ROWS, hidden_size=8, intermediate_size=32, num_layers=1, num_heads=2, tied=True,
        max_positions=16,
    ),
    "gpt_neox": ModelShape(
        family="gpt_neox", vocabulary_size=ROWS, hidden_size=8, intermediate_size=32, num_layers=1, num_heads=2
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def source(request) -> RandomSource:
    return RandomSource(SHAPES[request.param].to_config(), seed=3)


@pytest.fixture
def grown(source) -> GrownSource:
    return GrownSource(source, SIZE, USED, ORIGINS)


def changed(source, grown) -> list[str]:
    return [name for name in source.names() if source.shape(name) != grown.shape(name)]


def test_only_embedding_and_head_grow(source, grown):
    tied = ModelShape.from_config(source.config).tied
    assert len(changed(source, grown)) == (1 if tied else 2)
    assert grown.names() == source.names()
    assert ModelShape.from_config(grown.config).vocabulary_size == SIZE
    assert grown.config == source.config | {"vocab_size": SIZE}
    assert source.config["vocab_size"] == ROWS
    for name in grown.names():
        assert grown.read(name).shape == grown.shape(name)
        if name not in changed(source, grown):
            assert torch.equal(grown.read(name), source.read(name))


def test_rows_are_the_means_of_their_origins(source, grown):
    for name in changed(source, grown):
        old_VD, new_VD = source.read(name), grown.read(name)
        assert torch.equal(new_VD[:USED], old_VD[:USED])
        for row, origin in enumerate(ORIGINS, USED):
            torch.testing.assert_close(new_VD[row], sum(old_VD[i] for i in origin) / len(origin))
        padding = new_VD[USED + len(ORIGINS) :]
        torch.testing.assert_close(padding, old_VD[:USED].mean(0).expand_as(padding))


def test_any_part_is_that_of_the_whole(source, grown):
    for name in changed(source, grown):
        whole = grown.read(name).reshape(-1)
        assert len(whole) == math.prod(grown.shape(name))
        edges = [0, 1, 8, 9, USED * 8 - 3, USED * 8, USED * 8 + 5, (USED + 3) * 8 + 1, (USED + 4) * 8, len(whole)]
        for start in edges:
            for stop in edges:
                if start <= stop:
                    assert torch.equal(grown.read_flat(name, start, stop), whole[start:stop]), (start, stop)


def test_old_rows_are_read_without_the_whole_tensor(source, grown, monkeypatch):
    monkeypatch.setattr(source, "read", lambda name: pytest.fail("read as a whole"))
    monkeypatch.setattr(source, "read_flat", lambda name, start, stop: torch.arange(start, stop))
    name = "transformer.wte.weight" if source.config["model_type"] == "gpt2" else grown.names()[0]
    assert grown.read_flat(name, 5, USED * 8).tolist() == list(range(5, USED * 8))


def test_a_grown_model_of_plain_transformers_predicts_old_tokens_as_before(source, grown, tmp_path):
    written = write_folder(tmp_path, grown.config, ((name, grown.read(name)) for name in grown.names()))
    assert list(written) == grown.names()
    assert FolderSource(tmp_path).config["vocab_size"] == SIZE
    ids = torch.arange(USED)[None, :16]
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        old, new = load_plain(source)(ids).logits, model(ids).logits
    assert new.shape[-1] == SIZE
    torch.testing.assert_close(new[..., :USED], old[..., :USED], rtol=1e-6, atol=1e-6)
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == SIZE


def test_the_stored_dtype_stays_and_means_are_not_taken_in_it():
    config = SHAPES["llama"].to_config()
    source = RandomSource(config, seed=3)
    half = {name: source.read(name).to(torch.bfloat16) for name in source.names()}
    half["model.embed_tokens.weight"][:4] = torch.tensor([1.0, 256.0, -256.0, 3.0])[:, None]
    from minima.models.weights import MemorySource

    grown = GrownSource(MemorySource(config, half), SIZE, USED, [[1, 0, 2]]).read("model.embed_tokens.weight")
    assert grown.dtype == torch.bfloat16
    assert torch.equal(grown[USED], torch.full((8,), 1 / 3).to(torch.bfloat16))  # 256 + 1 is 256 in bfloat16


def test_a_cut_model_is_the_model_without_its_last_rows(source, tmp_path):
    cut = CutSource(source, USED)
    assert cut.config == source.config | {"vocab_size": USED} and source.config["vocab_size"] == ROWS
    assert {name: cut.shape(name) for name in cut.names()} == {
        name: (USED, *source.shape(name)[1:]) if name in changed(source, cut) else source.shape(name)
        for name in source.names()
    }
    assert len(changed(source, cut)) == (1 if ModelShape.from_config(source.config).tied else 2)
    for name in cut.names():
        whole = cut.read(name)
        assert whole.shape == cut.shape(name)
        assert torch.equal(cut.read_flat(name, 3, whole.numel()), whole.reshape(-1)[3:])
    write_folder(tmp_path, cut.config, ((name, cut.read(name)) for name in cut.names()))
    ids = torch.arange(USED)[None, :16]
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load_plain(source)(ids).logits[..., :USED], rtol=1e-6, atol=1e-6)
