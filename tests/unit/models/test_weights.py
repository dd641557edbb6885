"""Weights by name: any layout on disk, any part of a tensor, and no pickle."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from minima.errors import CheckpointError
from minima.models import weights
from minima.models.causal_lm import load_plain
from minima.models.shape import ModelShape
from minima.models.weights import FolderSource, MemorySource, RandomSource, model_identity, tensor_sha256, write_folder

SHAPE = ModelShape(vocabulary_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, tied=True)


@pytest.fixture
def source() -> RandomSource:
    return RandomSource(SHAPE.to_config(), seed=1)


def write(folder, source, **settings):
    return write_folder(folder, source.config, ((name, source.read(name)) for name in source.names()), **settings)


def test_random_weights_follow_from_seed_and_name_alone(source):
    name = source.names()[0]
    whole = source.read(name)
    assert source.read_flat(name, 5, 21).equal(whole.view(-1)[5:21])
    assert RandomSource(source.config, seed=1).read(name).equal(whole)
    assert not RandomSource(source.config, seed=2).read(name).equal(whole)
    assert whole.std().item() == pytest.approx(0.02, rel=0.1)
    assert source.read("model.norm.weight").eq(1).all()
    assert sum(source.read(name).numel() for name in source.names()) == SHAPE.parameters


@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 2_000])
def test_a_written_folder_reads_back_whole_and_in_parts(source, tmp_path, shard_bytes):
    hashes = write(tmp_path, source, shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes == 2_000)
    assert all(load_file(path) for path in tmp_path.glob("*.safetensors")), "none is empty"
    found = FolderSource(tmp_path)
    assert found.names() == source.names()
    for name in source.names():
        whole = source.read(name)
        assert found.read(name).equal(whole) and hashes[name] == tensor_sha256(whole)
        size = whole.numel()
        for start, stop in [(0, size), (size // 3, size // 2 + 3), (7, 7), (1, size - 1), (size - 1, size)]:
            assert found.read_flat(name, start, stop).equal(whole.view(-1)[start:stop])
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(stock(tokens).logits, load_plain(source)(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_a_folder_says_which_dtype_it_holds(source, tmp_path, dtype):
    write(tmp_path, source, dtype=dtype)
    stored = {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    said = json.loads((tmp_path / "config.json").read_text())["dtype"]
    assert stored == {dtype or torch.float32} and said == str(dtype or torch.float32).removeprefix("torch.")


def test_a_view_does_not_drag_its_base_into_the_file(tmp_path, source):
    name = source.names()[0]
    base = torch.zeros(1000, 16)
    tensors = {key: source.read(key) for key in source.names()} | {name: base[:40]}
    write(tmp_path, MemorySource(source.config, tensors))
    assert (tmp_path / "model.safetensors").stat().st_size < SHAPE.parameters * 4 + 10_000


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE.to_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)pytorch_model.bin.*executes code"):
        FolderSource(tmp_path)


def test_what_is_missing_or_of_another_shape_is_named(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FolderSource(tmp_path)
    write(tmp_path, source)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if key != "model.norm.weight"}, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        FolderSource(tmp_path)
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\(3,\)"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["model.safetensors"]}', '{"weight_map": ' + "[" * 100_000])
def test_a_broken_index_is_named(source, tmp_path, content):
    write(tmp_path, source, shard_bytes=2_000)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("layers", [10**9, -2, 2.5])
def test_layers_that_the_files_cannot_have_are_refused_before_they_fill_the_memory(
    source, tmp_path, monkeypatch, layers
):
    write(tmp_path, source)
    (tmp_path / "config.json").write_text(json.dumps(source.config | {"num_hidden_layers": layers}))
    monkeypatch.setattr(weights, "parameter_shapes", lambda config: pytest.fail("the model would be built"))
    with pytest.raises(CheckpointError, match=rf"says {layers} layers, but the files hold 20 tensors"):
        FolderSource(tmp_path)


def test_a_named_pipe_is_not_waited_for(source, tmp_path):
    write(tmp_path, source)
    os.mkfifo(tmp_path / "pipe.safetensors")
    index = {"weight_map": dict.fromkeys(source.names(), "pipe.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="it is a named pipe"):
        FolderSource(tmp_path)


def test_a_configuration_of_too_many_brackets_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: maximum recursion"):
        FolderSource(tmp_path)


def test_a_file_that_is_cut_off_is_named(source, tmp_path):
    write(tmp_path, source)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        FolderSource(tmp_path)


def test_a_checkpoint_of_the_bare_backbone_is_read(source, tmp_path):
    write(tmp_path, source)
    path = tmp_path / "model.safetensors"
    save_file({key.removeprefix("model."): value for key, value in load_file(path).items()}, path)
    assert FolderSource(tmp_path).read("model.norm.weight").eq(1).all()


class Reads(MemorySource):
    """Counts what is read of the tensors."""

    def __init__(self, config, tensors) -> None:
        super().__init__(config, tensors)
        self.parts: list[int] = []

    def read(self, name):
        raise AssertionError("a tensor of a large model is not read whole")

    def read_flat(self, name, start, stop):
        self.parts.append(stop - start)
        return super().read_flat(name, start, stop)


@pytest.mark.parametrize(
    ("first", "last"),
    [(3000, 4000), (3800, 3937), (2000, 2002), (3999, 4000)],
    ids=["many", "few, then 63 of no token", "middle", "the last"],
)
def test_rows_anywhere_make_another_model(first, last):
    rows = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    norm = torch.ones(64)
    one = Reads({}, {"embedding": rows, "norm": norm})
    before = model_identity(one)
    assert len(one.parts) <= 12 and sum(one.parts) < 20_000
    assert model_identity(MemorySource({}, {"embedding": rows.clone(), "norm": norm})) == before
    other = rows.clone()
    other[first:last] += 1e-3
    assert model_identity(MemorySource({}, {"embedding": other, "norm": norm})) != before


def test_a_written_random_model_keeps_its_identity(tmp_path):
    source = RandomSource(SHAPE.model_copy(update={"vocabulary_size": 2000}).to_config(), seed=3)
    write(tmp_path, source)
    assert model_identity(FolderSource(tmp_path)) == model_identity(source)


def test_each_random_tensor_has_numbers_of_its_own_and_biases_are_zero():
    shape = ModelShape(
        family="gpt_neox", vocabulary_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4
    )
    for drawn in (RandomSource(SHAPE.to_config(), seed=1), RandomSource(shape.to_config(), seed=1)):
        matrices = [drawn.read(name).flatten() for name in drawn.names() if len(drawn.shape(name)) == 2]
        starts = torch.stack([matrix[:64] for matrix in matrices])
        assert len(starts.unique(dim=0)) == len(matrices) >= 8, "two tensors of a size would be equal"
        for name in drawn.names():
            if name.endswith("bias"):
                assert not drawn.read(name).any()
    assert any(name.endswith("bias") for name in drawn.names())


def test_random_weights_are_as_large_as_the_configuration_says():
    wide = RandomSource(SHAPE.to_config() | {"initializer_range": 0.5}, seed=1)
    assert wide.read(wide.names()[0]).std().item() == pytest.approx(0.5, rel=0.1)
