"""One owner for everything that decides what is computed."""

import json

import pytest

from minima.engine.deepspeed_config import RECIPE_OWNS, accumulation_steps, frozen_config, training_config
from minima.errors import DeepSpeedConfigError
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
    with pytest.raises(DeepSpeedConfigError, match=key):
        frozen_config(path, precision="float32")


@pytest.mark.parametrize("content", ["{", {"zero_optimization": {"stage": 2}}, {}])
def test_what_is_not_zero_3_or_not_json_is_refused(write, content):
    with pytest.raises(DeepSpeedConfigError):
        frozen_config(write(content), precision="float32")


@pytest.mark.parametrize(
    "zero",
    [
        {"mics_shard_size": 2},
        {"zero_hpz_partition_size": 4},
        {"offload_param": {"device": "nvme"}},
        {"offload_optimizer": {"device": "nvme"}},
    ],
)
def test_shards_that_would_be_read_wrongly_are_refused(write, zero):
    with pytest.raises(DeepSpeedConfigError, match="its own part of a tensor"):
        frozen_config(write({"zero_optimization": {"stage": 3, **zero}}), precision="float32")


def test_offload_to_the_cpu_and_a_communication_dtype_are_the_jsons_own(write):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    path = write({"zero_optimization": zero, "communication_data_type": "bf16"})
    assert training_config(path, training(), 1)["communication_data_type"] == "bf16"
    assert frozen_config(path, precision="float32")["zero_optimization"] == zero


def test_a_batch_that_does_not_divide_names_the_counts_that_do():
    assert accumulation_steps(training(), 4) == 3
    with pytest.raises(DeepSpeedConfigError, match=r"(?s)12 micro-batches.*5 ranks.*1, 2, 3, 4, 6, 12 ranks"):
        accumulation_steps(training(), 5)


def test_the_recipe_is_carried_over_whole(root):
    config = training_config(
        root / "ds_configs/student_zero3.json", training(gradient_clip=0.7, precision="bfloat16"), 3
    )
    assert config["train_batch_size"] == 24 == 3 * 2 * config["gradient_accumulation_steps"]
    assert config["gradient_clipping"] == 0.7 and config["bf16"]["enabled"]
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_every_shipped_json_is_accepted(root):
    paths = sorted((root / "ds_configs").glob("*.json"))
    assert len(paths) >= 2
    for path in paths:
        assert frozen_config(path, precision="bfloat16")["zero_optimization"]["stage"] == 3
