"""The sliced model computes what the masked one does, in every family, and loads with plain transformers."""

import math
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from minima.errors import ShapeError
from minima.models.causal_lm import load_plain
from minima.models.families import family_of
from minima.models.shape import ModelShape
from minima.models.stock import parameter_shapes
from minima.models.weights import MemorySource, write_folder
from minima.pruning.importance import Scores, random
from minima.pruning.masks import Masks
from minima.pruning.selection import Selection, select
from minima.pruning.surgery import PrunedSource
from minima.pruning.target import plan_target
from minima.recipe.pruning import PruneTarget


def logits_of(source, ids_BT):
    with torch.no_grad():
        return load_plain(source)(input_ids=ids_BT, use_cache=False).logits


def cut(small, *, selection="local", layers=None, width=True, seed=3) -> Selection:
    """A selection by random scores that halves the heads, and the width where the family can."""
    shape = small.shape
    target = PruneTarget(
        num_layers=layers,
        hidden_size=shape.hidden_size // 2 if width else None,
        num_heads=shape.num_heads // 2 if shape.num_key_value_heads % 2 == 0 else shape.num_heads * 2 // 3,
        intermediate_size=24,
    )
    plan = plan_target(shape, target, selection=selection)
    return select(random(shape, seed, identity="x"), plan)


def set_masks(masks: Masks, chosen: Selection) -> None:
    with torch.no_grad():
        for mask in masks.tensors():
            mask.zero_()
        masks.hidden_D[chosen.hidden] = 1
        for layer, groups, neurons in zip(chosen.layers.tolist(), chosen.groups, chosen.neurons, strict=True):
            masks.head_LK[layer, groups] = 1
            masks.neuron_LI[layer, neurons] = 1


@contextmanager
def norms_over(model, shape, kept_dims):
    """Let the norms take their statistics over the kept dimensions only, and give zeros elsewhere.

    With hidden masks that are zero outside `kept_dims`, the model then computes what the sliced model computes.
    """
    family = family_of(shape.family)

    def hook(norm, inputs, output):
        kept = inputs[0].index_select(-1, kept_dims)
        parameters = dict(norm.named_parameters())
        weight = parameters["weight"].index_select(0, kept_dims)
        if family.rms:
            kept = functional.rms_norm(kept, kept.shape[-1:], weight, shape.norm_epsilon)
        else:
            bias = parameters["bias"].index_select(0, kept_dims)
            kept = functional.layer_norm(kept, kept.shape[-1:], weight, bias, shape.norm_epsilon)
        return torch.zeros_like(output).index_copy(-1, kept_dims, kept)

    norms = [model.get_submodule(family.final_norm)]
    for layer in model.get_submodule(family.layers).children():
        norms += [layer.get_submodule(path) for path in family.norms]
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(hook).remove)
        yield


def test_nothing_removed_changes_nothing(any_small):
    plan = plan_target(any_small.shape, PruneTarget())
    pruned = PrunedSource(any_small.source, select(random(any_small.shape, 0, identity="x"), plan))
    torch.testing.assert_close(logits_of(pruned, any_small.ids_BT), any_small.logits(), atol=1e-5, rtol=0)
    assert pruned.parameters == any_small.shape.parameters


@pytest.mark.parametrize("selection", ["local", "global"])
def test_masked_equals_sliced(any_small, selection):
    width = not (selection == "global" and any_small.shape.family in ("gpt_neox", "gpt2"))
    chosen = cut(any_small, selection=selection, width=width)
    masks = Masks(any_small.shape)
    set_masks(masks, chosen)
    with masks.attached(any_small.model), norms_over(any_small.model, any_small.shape, chosen.hidden), torch.no_grad():
        masked = any_small.logits()
    sliced = logits_of(PrunedSource(any_small.source, chosen), any_small.ids_BT)
    assert (masked - any_small.logits()).abs().max() > 0.1  # the masks are gone, and they did something
    difference = (sliced - masked).abs()
    assert difference.max() <= 1e-5
    assert (sliced - masked).mean().abs() <= 1e-6


def test_masked_equals_sliced_at_a_layer_less(any_small):
    chosen = cut(any_small, layers=any_small.shape.num_layers - 1)
    family = family_of(any_small.shape.family)
    parent, _, last = family.layers.rpartition(".")
    layers = any_small.model.get_submodule(family.layers)
    masks = Masks(any_small.shape)
    set_masks(masks, chosen)
    sliced = logits_of(PrunedSource(any_small.source, chosen), any_small.ids_BT)
    with masks.attached(any_small.model), norms_over(any_small.model, any_small.shape, chosen.hidden), torch.no_grad():
        setattr(any_small.model.get_submodule(parent), last, nn.ModuleList([layers[i] for i in chosen.layers.tolist()]))
        any_small.model.config.num_hidden_layers = len(chosen.layers)
        masked = any_small.logits()
    torch.testing.assert_close(sliced, masked, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "mistral", "qwen2", "qwen3"])
def test_rms_compensation_is_the_masked_model_with_its_norms_as_they_are(small, name):
    one = small(name)
    chosen = cut(one)
    masks = Masks(one.shape)
    set_masks(masks, chosen)
    with masks.attached(one.model), torch.no_grad():
        masked = one.logits()
    compensated = logits_of(PrunedSource(one.source, chosen, "rms"), one.ids_BT)
    published = logits_of(PrunedSource(one.source, chosen, "none"), one.ids_BT)
    torch.testing.assert_close(compensated, masked, atol=1e-5, rtol=0)
    assert (published - masked).abs().max() > 1e-2


def test_rms_compensation_scales_weight_and_epsilon(small):
    one = small("llama")
    chosen = cut(one)
    pruned = PrunedSource(one.source, chosen, "rms")
    expected = one.source.read("model.norm.weight")[chosen.hidden] * math.sqrt(2)
    torch.testing.assert_close(pruned.read("model.norm.weight"), expected)
    assert pruned.config["rms_norm_eps"] == pytest.approx(2 * one.shape.norm_epsilon)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(pruned.read(query), PrunedSource(one.source, chosen).read(query))


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_rms_compensation_is_refused_for_layer_norms(small, name):
    one = small(name)
    with pytest.raises(ShapeError, match="LayerNorm"):
        PrunedSource(one.source, cut(one), "rms")


def test_written_folder_loads_with_plain_transformers(any_small, tmp_path):
    chosen = cut(any_small, layers=any_small.shape.num_layers - 1)
    pruned = PrunedSource(any_small.source, chosen)
    write_folder(tmp_path, pruned.config, ((name, pruned.read(name)) for name in pruned.names()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        again = loaded.eval()(input_ids=any_small.ids_BT, use_cache=False).logits
    torch.testing.assert_close(again, logits_of(pruned, any_small.ids_BT), atol=1e-6, rtol=0)
    if any_small.shape.family not in ("gpt_neox", "gpt2"):
        assert loaded.config.num_key_value_heads == chosen.student.num_key_value_heads
    assert ModelShape.from_folder(tmp_path) == chosen.student
    assert sum(parameter.numel() for parameter in loaded.parameters()) == chosen.student.parameters


def test_names_shapes_and_flat_reads_are_those_of_a_stock_model(any_small):
    pruned = PrunedSource(any_small.source, cut(any_small, layers=1))
    expected = parameter_shapes(pruned.config)
    assert {name: pruned.shape(name) for name in pruned.names()} == expected
    for name, shape in expected.items():
        whole = pruned.read(name)
        assert tuple(whole.shape) == shape
        assert torch.equal(pruned.read_flat(name, 5, 11), whole.flatten()[5:11])


def test_global_selection_pads_with_zeros_and_counts_them(small):
    one = small("llama")
    scores = random(one.shape, 0, identity="x")
    scores.head_LK.copy_(torch.tensor([[9, 8, 7, 1e-3], [9, 1e-3, 1e-3, 1e-3], [9, 9, 1e-3, 1e-3], [9, 9, 0, 0.0]]))
    plan = plan_target(one.shape, PruneTarget(num_heads=2, intermediate_size=20), selection="global")
    chosen = select(scores, plan)
    assert [len(groups) for groups in chosen.groups] == [3, 1, 2, 2]
    assert sum(len(neurons) for neurons in chosen.neurons) == 4 * 20
    # Three heads do not divide a width of 32, so the widest layer's three are padded to four.
    assert chosen.student.num_heads == 4
    pruned = PrunedSource(one.source, chosen)
    assert pruned.parameters == chosen.student.parameters
    uniform = plan_target(one.shape, PruneTarget(num_heads=2, intermediate_size=20))
    assert pruned.parameters_without_padding == uniform.student.parameters  # as many heads and neurons in all
    query = pruned.read("model.layers.1.self_attn.q_proj.weight")
    assert query.shape == (32, 32)
    assert (query[8:] == 0).all()
    assert (query[:8] != 0).all()


def test_sliding_layers_keep_their_kind(small):
    one = small("qwen2")
    config = one.source.config | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    source = MemorySource(config, {name: one.source.read(name) for name in one.source.names()})
    chosen = cut(one, layers=2)
    assert chosen.layers.tolist() == [0, 1]
    assert PrunedSource(source, chosen).config["layer_types"] == ["full_attention", "sliding_attention"]


def test_depth_cut_refused_where_layers_scale_by_their_number(small):
    one = small("gpt2")
    source = MemorySource(one.source.config | {"scale_attn_by_inverse_layer_idx": True}, {})
    with pytest.raises(ShapeError, match="scale_attn_by_inverse_layer_idx"):
        PrunedSource(source, cut(one, layers=2))


def test_scores_of_another_model_are_refused(small):
    one = small("llama")
    scores = Scores("random", "x", torch.rand(2, 4), torch.rand(2, 40), torch.rand(32))
    with pytest.raises(ShapeError, match="2 layers"):
        select(scores, plan_target(one.shape, PruneTarget()))
