"""What stages say of memory before they build a model."""

import logging

import pytest

from minima.launcher import Launch
from minima.models.shape import ModelShape
from minima.planning.candidates import Devices
from minima.planning.hardware import find_gpu
from minima.planning.run_plan import PlannedGpus
from minima.recipe.schema import Recipe
from minima.stages import memory_plan
from minima.stages.context import StageContext
from minima.stages.preview.plan_walk import plan_run

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


@pytest.mark.parametrize(
    ("settings", "name", "weight_bytes"),
    [
        ({}, "zero3", 4),
        ({"reference_precision": "bfloat16"}, "zero3", 2),
        ({"reference_deepspeed": "teacher_cpu.json"}, "zero3+cpu", 4),
    ],
)
def test_a_reference_is_planned_as_it_runs(tmp_path, monkeypatch, settings, name, weight_bytes):
    corpus = {"name": "pairs", "kind": "build_data", "format": "preferences", "sources": [{"embedded": "preferences"}],
              "tokenizer": "tok", "sequence_length": 128, "tokens": 128_000}  # fmt: skip
    small = LLAMA2_7B.model_copy(update={"num_layers": 2})
    own = {"name": "a", "kind": "align", "model": {"random": small}, "data": "pairs", "learning_rate": 1e-5,
           "batch_sequences": 16, "micro_batch_sequences": 1, "steps": 10, "precision": "float32"}  # fmt: skip
    recipe = Recipe.model_validate({"name": "run", "output": str(tmp_path), "stages": [corpus, own | settings]})
    stage = recipe.stages[1]
    gpus = PlannedGpus(2, 2, find_gpu("h100"), host_bytes=10**12)
    monkeypatch.setattr(memory_plan, "these_devices", lambda: gpus.devices)
    monkeypatch.setattr(memory_plan.distributed, "is_main", lambda: False)
    context = StageContext(recipe, tmp_path / "r.yaml", stage, tmp_path / "a", tmp_path, Launch())
    run = memory_plan.plan_memory(context, stage, small, 128, small).chosen
    planned = plan_run(recipe, tmp_path / "r.yaml", gpus)[1].chosen
    assert run.name == planned.name == name
    assert run.window == planned.window == 1, "the reference is asked for one micro-batch at a time"
    assert (run.peak_bytes, run.host_bytes) == (planned.peak_bytes, planned.host_bytes)
    share = weight_bytes * small.parameters / 2
    weights = run.teacher.host["weights"] if name == "zero3+cpu" else run.teacher.device["weights"]
    assert share <= weights < 2.1 * share, "page-locked memory comes in powers of two"
    assert (weights < 1.01 * share) == (name == "zero3")
