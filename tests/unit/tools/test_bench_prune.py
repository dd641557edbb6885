"""The benchmark of cuts at a tiny size: every way of minima's, and what it says of a library that is not installed."""

import argparse
import math
import sys

import numpy as np
import pytest

from minima.data.packing import StoreWriter
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, write_folder
from tools import bench_prune

SHAPE = ModelShape(
    vocabulary_size=50, hidden_size=48, intermediate_size=96, num_layers=2, num_heads=6, num_key_value_heads=3
)


@pytest.fixture
def options(tmp_path):
    """Gives what the command line would, for one way."""
    source = RandomSource(SHAPE.to_config(), seed=0)
    write_folder(tmp_path / "model", source.config, ((name, source.read(name)) for name in source.names()))
    tokens = np.random.default_rng(0).integers(0, 50, 16 * 20)
    for name in ("train", "held_out"):
        with StoreWriter(tmp_path / name, sequence_length=16, vocabulary_size=50, end_token=0) as writer:
            writer.append(tokens, np.array([len(tokens)]), np.array([len(tokens)]))
            writer.finish()
            writer.publish()
    return lambda way, steps=0: argparse.Namespace(
        way=way, model=tmp_path / "model", data=tmp_path, blocks=8, steps=steps
    )


@pytest.mark.parametrize("way", [way for way in bench_prune.WAYS if way.startswith("minima")])
def test_each_way_keeps_two_thirds(options, way):
    row = bench_prune._measure(options(way, steps=1))
    kept = SHAPE.model_copy(
        update={"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "num_key_value_heads": 2, "head_size": 8}
    )
    assert row["parameters"] == kept.parameters
    assert math.isfinite(row["loss"]) and math.isfinite(row["distilled"]) and row["distilled"] != row["loss"]


def test_a_library_that_is_not_installed_is_a_row_that_says_so(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert "not installed" in bench_prune._measure(options("torch-pruning"))["missing"]
