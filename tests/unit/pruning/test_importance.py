"""Importance is the gradient that finite differences see, over valid tokens, however the ranks share the batches."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from minima.batch import IGNORE_INDEX, Batch, make_batch
from minima.errors import DataError, StageError
from minima.models.compiling import recompute
from minima.models.families import family_of
from minima.models.weights import MemorySource, model_identity
from minima.pruning.importance import Scores, importance, magnitude, random
from minima.pruning.masks import Masks
from minima.pruning.selection import select
from minima.pruning.surgery import PrunedSource
from minima.pruning.target import plan_target
from minima.recipe.pruning import PruneTarget


def batches_of(small, count=3, valid=None):
    generator = torch.Generator().manual_seed(7)
    return [make_batch(torch.randint(0, 61, (2, 9), generator=generator), valid) for _ in range(count)]


def measured(small, batches, **options) -> Scores:
    return importance(
        lambda forward, batch: forward(small.model, batch),
        small.model,
        batches,
        small.shape,
        identity="x",
        **options,
    )


def assert_same(one: Scores, other: Scores, tolerance: float = 1e-7) -> None:
    for name in ("head_LK", "neuron_LI", "hidden_D"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox", "gpt2"])
def test_importance_is_the_finite_difference(small, name):
    one = small(name)
    one.model.double()
    (batch,) = batches_of(one, 1)
    masks = Masks(one.shape)

    def loss() -> float:
        with masks.attached(one.model), torch.no_grad():
            logits = one.model(input_ids=batch.input_ids_BT, use_cache=False).logits
            return float(cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE_INDEX))

    scores = measured(one, [batch])
    for mask, score in zip(masks.tensors(), (scores.head_LK, scores.neuron_LI, scores.hidden_D), strict=True):
        flat = mask.detach().view(-1)
        for index in range(0, flat.numel(), max(1, flat.numel() // 5)):
            losses = []
            for step in (1, -1, 2, -2):
                flat[index] = 1 + step * 2**-6  # exact in float32, which the masks are
                losses.append(loss())
            flat[index] = 1
            # The five-point rule: RMSNorms compute in float32, so a step has to be large for the noise in the loss.
            difference = (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / 12 * 2**6
            assert float(score.view(-1)[index]) == pytest.approx(abs(difference), rel=1e-3, abs=2e-5)
        assert score.max() > 1e-4


def test_mean_of_absolute_gradients_over_micro_batches(small):
    one = small("llama")
    batches = batches_of(one)
    each = [measured(one, [batch]) for batch in batches]
    together = measured(one, batches)
    assert together.batches == 3
    torch.testing.assert_close(together.hidden_D, torch.stack([scores.hidden_D for scores in each]).mean(0))
    torch.testing.assert_close(together.head_LK, torch.stack([scores.head_LK for scores in each]).mean(0))


def test_padding_is_left_out(small):
    one = small("llama")
    short = torch.randint(0, 61, (2, 6), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([short, torch.full((2, 3), 60)], 1)
    valid = torch.arange(9).expand(2, 9) < 6
    assert_same(measured(one, [make_batch(padded, valid)]), measured(one, [make_batch(short)]))
    counted = measured(one, [make_batch(padded)])
    assert not torch.allclose(counted.hidden_D, measured(one, [make_batch(short)]).hidden_D, rtol=1e-2)


def test_ranks_share_the_batches_and_empty_ones_count_for_nothing(small):
    one = small("llama-gqa")
    batches = batches_of(one, 3)
    empty = Batch(batches[0].input_ids_BT, torch.full_like(batches[0].labels_BT, IGNORE_INDEX))
    shares: list[list[torch.Tensor]] = []
    for share in ([batches[0], batches[2]], [batches[1], empty]):
        sent: list[torch.Tensor] = []
        measured(one, share, all_reduce_sum=lambda tensor, sent=sent: sent.append(tensor.clone()) or tensor)
        shares.append(sent)
    sums = iter([left + right for left, right in zip(*shares, strict=True)])
    two_ranks = measured(one, [batches[0], batches[2]], all_reduce_sum=lambda _: next(sums))
    assert two_ranks.batches == 3
    assert_same(two_ranks, measured(one, batches))
    with pytest.raises(DataError, match="no valid token"):
        measured(one, [empty])


def test_activation_checkpointing_gives_the_same(any_small):
    batches = batches_of(any_small, 2)
    plain = measured(any_small, batches)
    recompute(any_small.model, "full")
    any_small.model.train()  # without dropout it only switches checkpointing on
    assert_same(measured(any_small, batches), plain)
    assert all(parameter.grad is None for parameter in any_small.model.parameters())


def test_masks_of_one_change_nothing_and_leave_no_hook(any_small):
    before = any_small.logits()
    with Masks(any_small.shape).attached(any_small.model), torch.no_grad():
        assert torch.equal(any_small.logits(), before)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in any_small.model.modules()]
    assert sum(hooks) == 0


def test_masks_take_the_activations_dtype_and_sum_in_float32(small):
    one = small("llama")
    one.model.bfloat16()
    scores = measured(one, batches_of(one, 1))
    assert scores.hidden_D.dtype == torch.float32
    assert (scores.hidden_D != scores.hidden_D.bfloat16()).any()


def test_magnitude_is_the_norm_of_what_surgery_would_remove(any_small):
    scores = magnitude(any_small.source, any_small.shape, identity="x")
    family = family_of(any_small.shape.family)
    hidden = 0.0
    for name in any_small.source.names():
        tensor, axes = any_small.source.read(name).double(), [part and part.value for part in family.locate(name)[2]]
        if "hidden" in axes:
            hidden += float(tensor.select(axes.index("hidden"), 3).square().sum())
    assert float(scores.hidden_D[3]) ** 2 == pytest.approx(hidden, rel=1e-5)
    for layer in range(any_small.shape.num_layers):
        for axis, unit in ((scores.neuron_LI, 5), (scores.head_LK, 1)):
            field = "neuron" if axis is scores.neuron_LI else "head"
            expected = _squares_with(any_small, field, layer, unit)
            assert float(axis[layer, unit]) ** 2 == pytest.approx(expected, rel=1e-5)


def _squares_with(small, field: str, layer: int, unit: int) -> float:
    """Sum of squares of the weights that turn to zero when a unit's activations have no weights."""
    family, shape = family_of(small.shape.family), small.shape
    total = 0.0
    for name in small.source.names():
        number, _, axes = family.locate(name)
        parts = [part.value for part in axes if part is not None]
        tensor = small.source.read(name).double()
        if number != layer:
            continue
        if field == "neuron" and "neuron" in parts:
            total += float(tensor.select(parts.index("neuron"), unit).square().sum())
        if field == "head":
            for axis, part in enumerate(parts):
                size = shape.head_size
                if part in ("query", "key_value", "interleaved"):
                    width = tensor.shape[axis] // shape.num_key_value_heads
                    total += float(tensor.narrow(axis, unit * width, width).square().sum())
                elif part == "blocks":
                    for block in range(3):
                        start = block * shape.num_heads * size + unit * size
                        total += float(tensor.narrow(axis, start, size).square().sum())
    return total


def test_random_scores_follow_from_the_seed(small):
    shape = small("llama").shape
    assert torch.equal(random(shape, 1, identity="x").neuron_LI, random(shape, 1, identity="x").neuron_LI)
    assert not torch.equal(random(shape, 1, identity="x").neuron_LI, random(shape, 2, identity="x").neuron_LI)


def test_saved_scores_cut_another_target_alike(small, tmp_path):
    one = small("llama")
    identity = model_identity(one.source)
    scores = magnitude(one.source, one.shape, identity=identity)
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors", kind="magnitude", model=identity)
    assert_same(again, scores, 0.0)
    plan = plan_target(one.shape, PruneTarget(intermediate_size=8))
    first, second = (PrunedSource(one.source, select(each, plan)) for each in (scores, again))
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names())


def test_scores_of_another_model_or_kind_are_refused(small, tmp_path):
    one = small("llama")
    tensors = {name: one.source.read(name).clone() for name in one.source.names()}
    assert model_identity(MemorySource(one.source.config, tensors)) == model_identity(one.source)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    other = model_identity(MemorySource(one.source.config, tensors))
    path = tmp_path / "scores.safetensors"
    random(one.shape, 0, identity=model_identity(one.source)).save(path)
    with pytest.raises(StageError, match="model"):
        Scores.load(path, kind="random", model=other)
    with pytest.raises(StageError, match="kind"):
        Scores.load(path, kind="gradient", model=model_identity(one.source))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StageError, match="cannot be read"):
        Scores.load(path, kind="random", model=other)


def test_magnitudes_of_bfloat16_weights_are_not_rounded(small):
    one = small("llama")
    half = {name: one.source.read(name).bfloat16() for name in one.source.names()}
    whole = MemorySource(one.source.config, {name: tensor.float() for name, tensor in half.items()})
    found = magnitude(MemorySource(one.source.config, half), one.shape, identity="x")
    assert_same(found, magnitude(whole, one.shape, identity="x"), 0.0)


def test_saved_scores_say_over_how_many_micro_batches_they_are_a_mean(small, tmp_path):
    scores = measured(small("llama"), batches_of(small, 2))
    scores.save(tmp_path / "scores.safetensors")
    assert Scores.load(tmp_path / "scores.safetensors", kind="gradient", model="x").batches == 2
