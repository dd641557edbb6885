"""A checkpoint is what the student was when it was taken, though training goes on while its files are written."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minima.engine import distributed
from minima.engine.checkpoint import shards


@pytest.mark.parametrize("padding", [0, 2])
def test_a_snapshot_does_not_see_the_steps_that_come_after_it(tmp_path, monkeypatch, padding):
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    states = {kind: torch.arange(6.0) + number for number, kind in enumerate(("weights", "exp_avg", "exp_avg_sq"))}
    held = {kind: torch.cat([state, torch.zeros(padding)]) for kind, state in states.items()}
    monkeypatch.setattr(shards, "safe_get_local_fp32_param", lambda parameter: held["weights"])
    monkeypatch.setattr(shards, "safe_get_local_optimizer_state", lambda parameter, kind: held[kind])
    parameter = SimpleNamespace(
        ds_tensor=SimpleNamespace(ds_numel=6 + padding), ds_numel=6, ds_shape=(2, 3), ds_zero_partition_rank=0
    )
    student = SimpleNamespace(model=SimpleNamespace(named_parameters=lambda: [("matrix", parameter)]))
    write = shards.snapshot_shards(student)
    for tensor in held.values():
        tensor.mul_(-7)  # an optimiser on the CPU, or on the host of a GPU, updates in place
    write(tmp_path)
    for kind, state in states.items():
        assert load_file(tmp_path / shards.file_name(kind, 0, 1))["matrix"].equal(state), kind
