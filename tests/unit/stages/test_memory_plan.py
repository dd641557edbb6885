"""What the prune stage says of memory before it builds a model."""

import logging

from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.planning.candidates import Devices
from minima.recipe.schema import Recipe
from minima.stages import memory_plan
from minima.stages.context import StageContext

LLAMA2_7B = ModelShape(
    vocabulary_size=49216, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, max_positions=4096
)


def said(tmp_path, monkeypatch, caplog, gigabytes: int, on_cpu: bool = True, **settings) -> str:
    own = {"name": "cut", "kind": "prune", "model": "base", "data": "corpus", "target": {"sparsity": 50}}
    recipe = Recipe.model_validate({"name": "run", "stages": [own | {"micro_batch_sequences": 1} | settings]})
    stage = recipe.stages[0]
    memory = int(gigabytes * 1e9)
    devices = Devices(2, 2, device_bytes=memory, host_bytes=2 * memory, host_is_device=on_cpu)
    monkeypatch.setattr(memory_plan, "these_devices", lambda: devices)
    monkeypatch.setattr(memory_plan.distributed, "is_main", lambda: True)
    context = StageContext(recipe, tmp_path / "r.yaml", stage, tmp_path / "cut", tmp_path, Launch())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        memory_plan.log_scoring(context, stage, LLAMA2_7B, 256)
    return caplog.text


def test_a_7b_fits_two_ranks_of_24_gigabytes_with_the_shipped_json(tmp_path, monkeypatch, caplog):
    text = said(tmp_path, monkeypatch, caplog, 12)
    assert "cut: importance takes 8." in text and "weights 6.88 GB" in text and "may not fit" not in text


def test_what_may_not_fit_is_said_with_the_ways_out(tmp_path, monkeypatch, caplog):
    for more in ({"deepspeed": "teacher_zero3.json"}, {"precision": "float32"}):
        text = said(tmp_path, monkeypatch, caplog, 12, **more)
        assert "may not fit" in text and "stage3_max_live_parameters" in text, more


def test_weights_that_lie_in_the_hosts_memory_are_not_a_devices(tmp_path, monkeypatch, caplog):
    offloaded = {"deepspeed": "teacher_cpu.json"}
    assert "may not fit" in said(tmp_path, monkeypatch, caplog, 9, **offloaded)
    assert "weights" not in said(tmp_path, monkeypatch, caplog, 9, on_cpu=False, **offloaded).partition("device: ")[2]
