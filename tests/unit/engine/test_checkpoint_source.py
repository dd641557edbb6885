"""A checkpoint that some number of ranks wrote, read in the parts that any other number needs."""

import pytest
import torch
from safetensors.torch import save_file

from minima.engine.checkpoint.shards import CheckpointSource, file_name

SHAPES = {"matrix": [5, 4], "norm": [3], "number": [1]}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_part_is_that_of_the_whole(tmp_path, ranks):
    whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    for rank in range(ranks):
        shards = {}
        for name, tensor in whole.items():
            size = -(-tensor.numel() // ranks)  # of a padded shard; the file holds it without padding
            shards[name] = tensor.reshape(-1)[rank * size : (rank + 1) * size].clone()
        save_file(shards, tmp_path / file_name("exp_avg", rank, ranks))
    source = CheckpointSource(tmp_path, "exp_avg", {"config": {}, "shapes": SHAPES, "ranks": ranks})
    assert source.names() == list(SHAPES)
    for name, tensor in whole.items():
        assert source.shape(name) == tensor.shape and source.read(name).equal(tensor)
        flat = tensor.reshape(-1)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert source.read_flat(name, start, stop).equal(flat[start:stop]), (name, start, stop)
