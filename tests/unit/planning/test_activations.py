"""What the plan says of activations and tensors against what stock models and autograd really keep."""

import gc

import pytest
import torch

from minima.models.compiling import recompute
from minima.models.shape import FAMILIES, ModelShape
from minima.models.stock import DTYPES, build_empty
from minima.planning.activations import forward_bytes, saved_bytes
from minima.planning.sharding import layer_tensors, outer_tensors, tensors

SEQUENCES, LENGTH = 8, 64  # so that the rotary tables, which `full` keeps out of sight of the hooks, are few


def shape_of(family, **changes) -> ModelShape:
    given = {"vocabulary_size": 300, "hidden_size": 128, "intermediate_size": 352, "num_layers": 3, "num_heads": 4}
    given |= {"max_positions": 128} | ({} if family in ("gpt_neox", "gpt2") else {"num_key_value_heads": 2})
    return ModelShape(family=family, **(given | changes))


def kept_by_autograd(model, ids_BT) -> int:
    """Bytes of the tensors that the backbone's forward saves, parameters left out; of each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)


def allocated_bytes(run) -> int:
    """Bytes that the allocator gave out while `run` ran, less those that it got back: what stays alive after it."""
    gc.collect()
    gc.disable()  # what others have left would count as given back
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = run()
    finally:
        gc.enable()
    assert kept is not None
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_autograd_saves(family, checkpointing, precision):
    shape = shape_of(family)
    model = build_empty(shape.to_config(), DTYPES[precision]).train()
    recompute(model, checkpointing)
    measured = kept_by_autograd(model, torch.randint(0, 300, (SEQUENCES, LENGTH)))
    planned = saved_bytes(shape, precision, checkpointing, SEQUENCES * LENGTH, LENGTH)
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_selective_keeps_products_and_attention(family, precision):
    """Selective checkpoints keep outputs out of autograd's sight, so all that outlives a forward is counted."""
    few, many = [], []
    for layers, into in ((2, few), (6, many)):
        shape = shape_of(family, num_layers=layers)
        model = build_empty(shape.to_config(), DTYPES[precision]).train()
        recompute(model, "selective")
        ids_BT = torch.randint(0, 300, (SEQUENCES, LENGTH))
        into.append(allocated_bytes(lambda model=model, ids=ids_BT: model.base_model(input_ids=ids, use_cache=False)))
        into.append(saved_bytes(shape, precision, "selective", SEQUENCES * LENGTH, LENGTH))
    assert many[1] - few[1] == pytest.approx(many[0] - few[0], rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"attention_bias": True}, {"mlp_bias": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_the_stock_model(family, changes):
    shape = shape_of(family, **changes)
    with torch.device("meta"):
        model = build_empty(shape.to_config(), torch.float32)
    assert sorted(tensors(shape)) == sorted(parameter.numel() for parameter in model.parameters())
    assert sum(layer_tensors(shape)) == shape.layer_parameters
    assert sum(outer_tensors(shape)) == shape.parameters - shape.num_layers * shape.layer_parameters


def test_a_split_layer_runs_in_less():
    shape = shape_of("llama")
    whole, half = (forward_bytes(shape, "bfloat16", 64, ranks) for ranks in (1, 2))
    assert half < whole
