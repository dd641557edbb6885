"""One owner for everything that decides what is computed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minima.engine import deepspeed_config
from minima.engine.deepspeed_config import frozen_config, read_deepspeed_json, training_config
from minima.engine.deepspeed_keys import OFFLOAD, RECIPE_OWNS, TOP, ZERO
from minima.errors import DeepSpeedConfigError
from minima.models.shape import ModelShape
from minima.planning.sharding import STUDENT, gathered_ahead
from minima.recipe.distillation import Teacher
from minima.recipe.training import Training


def training(**changes) -> Training:
    settings = {"batch_sequences": 24, "micro_batch_sequences": 2, "steps": 1, "learning_rate": 1e-3}
    return Training(**(settings | changes))


@pytest.fixture
def write(tmp_path):
    def write(content) -> object:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize("key", RECIPE_OWNS)
def test_what_the_recipe_owns_is_refused(write, key):
    path = write({"zero_optimization": {"stage": 3}, key: 8})
    with pytest.raises(DeepSpeedConfigError, match=rf"sets {key}\b(?s:.*){key} is {RECIPE_OWNS[key]}"):
        frozen_config(path, precision="float32")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"nonsense": 1}, r"sets nonsense \(1\), which is not among"),
        ({"compile": {"deepcompile": True}}, r"sets compile "),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer is always false"),
        ({"zero_optimisation": {"stage": 3}}, r"did you mean 'zero_optimization'"),
        ({"gradient_cliping": 1.0}, r"did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, r"overlap_com \(True; did you mean 'overlap_comm'"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}, r"offload_optimizer\.ratio \(0\.5"),
        ({"x": 1, "zero_optimization": {"zenflow": {}}}, r"sets x \(1\), zero_optimization\.zenflow(?s:.*)remove them"),
    ],
)
def test_a_key_that_is_not_known_to_leave_numbers_alone_is_refused(write, content, said):
    with pytest.raises(DeepSpeedConfigError, match=said):
        frozen_config(write({"zero_optimization": {"stage": 3}} | content), precision="float32")


def names_of(model) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_only_the_listed_keys_of_zero_are_accepted(write):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    known = names_of(DeepSpeedZeroConfig)
    assert set(ZERO) - known == {"mics_shard_size"}, "DeepSpeed would refuse the others"
    assert set(OFFLOAD) <= names_of(DeepSpeedZeroOffloadOptimizerConfig) | names_of(DeepSpeedZeroOffloadParamConfig)
    others = known - set(ZERO)
    assert {"zero_quantized_weights", "zero_quantized_gradients", "zenflow"} <= others
    for key in others:
        with pytest.raises(DeepSpeedConfigError, match=rf"zero_optimization\.{key} "):
            frozen_config(write({"zero_optimization": {"stage": 3, key: True}}), precision="float32")


def test_profiling_and_logging_are_the_jsons_own(write):
    content = {key: {} for key in TOP if key != "tensor_parallel"} | {
        "steps_per_print": 7,
        "zero_optimization": {"stage": 3},
    }
    assert frozen_config(write(content), precision="float32").items() >= content.items()


@pytest.mark.parametrize(
    "content", ["{", {"zero_optimization": {"stage": 2}}, {}, {"zero_optimization": True}, "[1]", "3"]
)
def test_what_is_not_zero_3_or_not_json_is_refused(write, content):
    with pytest.raises(DeepSpeedConfigError):
        frozen_config(write(content), precision="float32")


@pytest.mark.parametrize(
    "zero",
    [
        {"mics_shard_size": 2},
        {"mics_shard_size": -1},
        {"zero_hpz_partition_size": 4},
        {"offload_param": {"device": "nvme"}},
        {"offload_optimizer": {"device": "nvme"}},
    ],
)
def test_shards_that_would_be_read_wrongly_are_refused(write, zero):
    with pytest.raises(DeepSpeedConfigError, match="its own part of a tensor"):
        frozen_config(write({"zero_optimization": {"stage": 3, **zero}}), precision="float32")


@pytest.mark.parametrize("placement", ["zero3", "replica"])
def test_what_only_a_training_step_uses_is_told_of_a_frozen_model(write, placement, caplog):
    zero = {"stage": 3 if placement == "zero3" else 0}
    content = {
        "zero_optimization": zero | {"offload_optimizer": {"device": "cpu"}},
        "flops_profiler": {"enabled": True},
    }
    with caplog.at_level("INFO"):
        frozen_config(write({"zero_optimization": zero}), precision="float32", placement=placement)
        assert not caplog.messages
        frozen_config(write(content), precision="float32", placement=placement)
    assert "offload_optimizer and flops_profiler not used" in caplog.messages[0]


def test_a_monitor_is_asked_for_where_the_engine_is_made_alone(write, monkeypatch):
    """A plan or a submission may be of other machines, whose Python is another."""
    path = write({"zero_optimization": {"stage": 3}, "comet": {"enabled": True}})
    monkeypatch.setattr(deepspeed_config, "find_spec", lambda name: None)
    assert read_deepspeed_json(path)["comet"]
    for make in (frozen_config, lambda path, precision: training_config(path, training(precision=precision), 1)):
        with pytest.raises(DeepSpeedConfigError, match="enables comet, but comet_ml is not installed"):
            make(path, precision="float32")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "lots"}}, "max_live_parameters to 'lots'"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": -5}}, "reduce_bucket_size to -5"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": float("inf")}}, "reduce_bucket_size to inf"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": True}}, "sub_group_size to True"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, "device to 'gpu'"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": "x"}}},
            "buffer_count to 'x'",
        ),
    ],
)
def test_values_that_deepspeed_would_refuse_later_are_refused_at_once(write, content, named):
    with pytest.raises(DeepSpeedConfigError, match=named):
        read_deepspeed_json(write(content))


def test_offload_to_the_cpu_is_the_jsons_own(write):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    path = write({"zero_optimization": zero})
    assert frozen_config(path, precision="float32")["zero_optimization"] == zero


def test_gradients_are_summed_in_float32(write):
    path = write({"zero_optimization": {"stage": 3}})
    assert training_config(path, training(precision="bfloat16"), 1)["communication_data_type"] == "fp32"


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (2, 6), (3, 8), (4, 6), (6, 4), (8, 3), (12, 2), (24, 1)])
def test_another_number_of_ranks_keeps_the_batch_and_cuts_micro_batches_anew(root, ranks, micro_batch):
    settings = training(micro_batch_sequences=8)
    config = training_config(root / "ds_configs/student_zero3.json", settings, ranks)
    assert config["train_micro_batch_size_per_gpu"] == micro_batch <= settings.micro_batch_sequences
    assert ranks * micro_batch * config["gradient_accumulation_steps"] == config["train_batch_size"] == 24


def test_the_recipe_is_carried_over_whole(root):
    config = training_config(
        root / "ds_configs/student_zero3.json", training(gradient_clip=0.7, precision="bfloat16"), 3
    )
    assert config["train_batch_size"] == 24 == 3 * 2 * config["gradient_accumulation_steps"]
    assert config["gradient_clipping"] == 0.7 and config["bf16"]["enabled"]
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


SHIPPED = {
    "prune_zero3": ("zero3", "none"),
    "student_zero3": ("zero3", "none"),
    "student_zero3_offload": ("zero3", "none"),
    "teacher_replica": ("replica", "none"),
    "teacher_zero3": ("zero3", "none"),
    "teacher_zero3_node": ("zero3_node", "none"),
    "teacher_tensor_parallel": ("tensor_parallel", "none"),
    "teacher_cpu": ("zero3_node", "cpu"),
    "teacher_nvme": ("zero3", "nvme"),
}


def test_there_is_a_json_for_every_placement_and_each_is_accepted(root):
    assert {path.stem for path in (root / "ds_configs").glob("*.json")} == set(SHIPPED)
    for name, (placement, offload) in SHIPPED.items():
        path = root / "ds_configs" / f"{name}.json"
        if name.startswith("student"):
            assert read_deepspeed_json(path)["zero_optimization"]["stage"] == 3
            continue
        if name.startswith("teacher"):
            assert Teacher.shipped_json(placement, offload) == path.name
        where = {"placement": placement, "offload": offload, "nvme_path": Path("/disk/run"), "tensor_parallel_ranks": 4}
        config = frozen_config(path, precision="bfloat16", **where)
        assert config["zero_optimization"]["stage"] == (0 if placement in ("replica", "tensor_parallel") else 3)
        if offload == "nvme":
            assert config["zero_optimization"]["offload_param"]["nvme_path"] == "/disk/run"
        assert ("tensor_parallel" in config) == (placement == "tensor_parallel")
        if placement == "tensor_parallel":
            assert config["tensor_parallel"] == {"autotp_size": 4}


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ({"zero_optimization": {"stage": 3}}, {"placement": "replica"}, "stage to 0"),
        ({"zero_optimization": {"stage": 0}}, {"placement": "zero3_node"}, "stage to 3"),
        ({"zero_optimization": {"stage": 0}}, {"placement": "tensor_parallel"}, "lacks tensor_parallel"),
        ({"zero_optimization": {"stage": 0}, "tensor_parallel": {}}, {"placement": "replica"}, "sets tensor_parallel"),
        ({"zero_optimization": {"stage": 3}}, {"placement": "zero3", "offload": "cpu"}, "offloads parameters to none"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            {"placement": "zero3", "offload": "none"},
            "offloads parameters to cpu",
        ),
        (
            {"zero_optimization": {"stage": 0}, "tensor_parallel": {"autotp_size": 2}},
            {"placement": "tensor_parallel"},
            "autotp_size",
        ),
    ],
)
def test_a_json_for_another_placement_is_refused(write, content, where, what):
    with pytest.raises(DeepSpeedConfigError, match=what):
        frozen_config(write(content), precision="float32", **where)


@pytest.mark.parametrize("block", [{"offload_param": "cpu"}, {"offload_optimizer": ["cpu"]}])
def test_a_block_that_is_none_is_named(tmp_path, block):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **block}}))
    with pytest.raises(DeepSpeedConfigError, match=f"sets {next(iter(block))} to"):
        frozen_config(path, precision="float32")


@pytest.mark.parametrize(("said", "meant"), [({}, 0), ({"stage3_max_reuse_distance": 7}, 7)])
def test_no_weight_is_kept_for_a_distance_that_nobody_named(tmp_path, said, meant):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **said}}))
    assert training_config(path, training(), 1)["zero_optimization"]["stage3_max_reuse_distance"] == meant


def test_a_layer_is_gathered_ahead_as_a_whole(root):
    path = root / "ds_configs/student_zero3.json"

    large = ModelShape(vocabulary_size=64, hidden_size=3072, intermediate_size=8192, num_layers=1, num_heads=24)
    assert large.layer_parameters > 5e7
    config = training_config(path, training(), 2, large)
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] == large.layer_parameters
    assert training_config(path, training(), 2)["zero_optimization"]["stage3_prefetch_bucket_size"] == 5e7
    shape = ModelShape(vocabulary_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1)
    assert gathered_ahead(STUDENT, shape) == STUDENT
    small = replace(STUDENT, prefetch_elements=10)
    assert gathered_ahead(small, shape).prefetch_elements == shape.layer_parameters
    nothing = replace(STUDENT, prefetch_elements=0)
    assert gathered_ahead(nothing, shape) == nothing


def test_deepspeed_waits_for_no_device_to_count_its_own_throughput(root):
    config = training_config(root / "ds_configs/student_zero3.json", training(), 1)
    assert config["timers"] == {"throughput": {"enabled": False}}
