"""Names in indexes and manifests stay in their folder, wherever they come from."""

import json

import pytest

from minima.data.store import TokenStore
from minima.disk import inside
from minima.engine.checkpoint.store import MARKER, verify_checkpoint
from minima.errors import StoreCorrupted
from minima.models.shape import ModelShape
from minima.models.weights import FolderSource

OUTSIDE = ["../secret", "/etc/hostname", "a/../../secret", "..", "", None, 3, "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(StoreCorrupted, match="names the file"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b", "a..b", "step-1.partial"])
def test_a_name_that_stays(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


def test_a_token_store_reads_nothing_outside(tmp_path):
    (tmp_path / "secret").write_bytes(b"ab")
    folder = tmp_path / "store"
    folder.mkdir()
    shard = {"file": "../secret", "bytes": 2, "tokens": 1, "sha256": "", "starts": {"file": "s", "bytes": 0}}
    index = {"format": "minima-tokens-1", "sequence_length": 1, "vocabulary_size": 2, "end_token": 0, "tokens": 1,
             "documents": 0, "bytes": 1, "dtype": "<u2", "shards": [shard]}  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreCorrupted, match=r"\.\./secret"):
        TokenStore.open(folder)


def test_a_checkpoint_reads_nothing_outside(tmp_path):
    (tmp_path / MARKER).write_text(json.dumps({"format": "minima-checkpoint-1", "sha256": {"../secret": "0"}}))
    with pytest.raises(StoreCorrupted, match=r"\.\./secret"):
        verify_checkpoint(tmp_path)


def test_a_model_folder_reads_nothing_outside(tmp_path):
    shape = ModelShape(vocabulary_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_config()))
    weights = {"weight_map": {"model.embed_tokens.weight": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(StoreCorrupted, match=r"\.\./secret"):
        FolderSource(tmp_path)
