"""Divergences and truncation against naive float64: values, gradients, odd shapes, and small differences."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minima.errors import MinimaError
from minima.losses import linear_distillation_loss
from minima.losses.divergences import DivergenceName, SoftTerm, _top, divergence_and_slope, one_tail
from minima.losses.linear import narrowed
from minima.recipe.distillation import Divergence
from tests.unit.losses.references import DIVERGENCES, divergence, exact, inputs, models_apart, with_gradients

# Of the gradients: the norm of the error over the norm of the reference. In bfloat16 the gradient is rounded (2^-9 at
# most, each time) as it enters the matrix product, as it leaves it, and as the backward pass scales it.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3}
VALUE_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-6}  # bfloat16 inputs are exact, and so are their products
CUTS = [{}, {"top_k": 1}, {"top_k": 4, "top_p": 0.5}, {"top_p": 0.8}, {"top_k": 10**6}]


def check(found, wanted, dtype) -> None:
    total, parts, *gradients = found
    exact_total, exact_parts, *exact_gradients = wanted
    torch.testing.assert_close(total.double(), exact_total, rtol=VALUE_TOLERANCE[dtype], atol=2e-6)
    for name, part in parts.items():
        torch.testing.assert_close(part.double(), exact_parts[name], rtol=2e-5, atol=2e-5)
    for gradient, reference in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        error, norm = (gradient.double() - reference).norm(), reference.norm()
        assert error <= TOLERANCE[dtype] * norm + 1e-6, f"relative error {error / norm:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_divergence_equals_dense_float64(name, cut, dtype):
    for tokens, vocabulary, chunk in ((1, 1, 4), (7, 5, 3), (10, 301, 4)):
        for hard, soft, tau in ((0.0, 1.0, 1.0), (0.3, 0.7, 2.0), (0.5, 0.5, 1.0), (0.0, 1.0, 0.7)):
            models = inputs(tokens, vocabulary, dtype)
            options = {"hard_weight": hard, "soft_weight": soft, "temperature": tau, "divergence": name,
                       "beta": 0.3, "alpha": 0.2, **cut}  # fmt: skip
            found = with_gradients(linear_distillation_loss, *models, **options, chunk_tokens=chunk)
            check(found, exact(*models, **options), dtype)


@pytest.mark.parametrize("nats", [4.5e-4, 0.01, 1.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_stays_right_where_the_models_agree(name, nats):
    """Under 0.5 % of its norm in bfloat16, of which the rounding of the result alone is 0.17 %."""
    models = models_apart(nats)
    options = {"hard_weight": 0.0, "soft_weight": 1.0, "divergence": name}
    found = with_gradients(linear_distillation_loss, *models, **options, chunk_tokens=16)
    wanted = exact(*models, **options)
    for gradient, reference in zip(found[2:], wanted[2:], strict=True):
        assert (gradient.double() - reference).norm() < 0.005 * reference.norm()
    # In float32 next to nothing is lost. Where p - q changes its sign, the total variation's gradient jumps.
    models = [tensor.float() if tensor.is_floating_point() else tensor for tensor in models]
    found = with_gradients(linear_distillation_loss, *models, **options, chunk_tokens=16)
    for gradient, reference in zip(found[2:], wanted[2:], strict=True):
        assert (gradient.double() - reference).norm() < (2e-3 if name == "total_variation" else 1e-4) * reference.norm()


def test_jensen_shannon_is_trls():
    from trl.experimental.gkd import GKDTrainer

    student, head, teacher, teacher_head, labels = inputs(12, 77)
    for beta, tau in ((0.5, 1.0), (0.1, 2.0), (0.9, 0.5)):
        found = with_gradients(
            linear_distillation_loss, student, head, teacher, teacher_head, labels,
            hard_weight=0.0, soft_weight=1.0, divergence="jensen_shannon", beta=beta, temperature=tau,
        )  # fmt: skip

        def theirs(student, head, beta=beta, tau=tau):
            total = GKDTrainer.generalized_jsd_loss(
                (student @ head.T)[None], (teacher @ teacher_head.T)[None], labels[None], beta, tau, reduction="sum"
            )
            return total * tau**2, {}

        wanted = with_gradients(theirs, student, head)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
        for gradient, reference in zip(found[2:], wanted[2:], strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5)


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6)


@settings(max_examples=40, deadline=None)
@given(LOGITS, LOGITS, st.sampled_from(DIVERGENCES), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_of_any_two_rows(teacher, student, name, mix, top_p):
    log_p, log_q = (torch.tensor([row]).log_softmax(-1) for row in (teacher, student))
    term = SoftTerm(name, beta=mix, alpha=mix, top_p=top_p)
    value, slope = divergence_and_slope(log_p.clone(), log_q.clone(), term)
    wanted = divergence(name, log_p.double().exp(), log_q.double().exp(), mix, mix)
    torch.testing.assert_close(value[0].double(), wanted, rtol=1e-4, atol=1e-5)
    assert slope.isfinite().all() and abs(slope.sum()) < 1e-5 * (1 + slope.abs().sum())  # a shift changes nothing
    cut_p, _ = one_tail(log_p, log_q, term)
    torch.testing.assert_close(cut_p.exp().sum(), torch.tensor(1.0))
    less, _ = divergence_and_slope(cut_p, log_q, term)
    assert less <= value + 1e-5 * (1 + value), "what is told apart less is closer"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_models_that_never_agree_give_finite_numbers(name):
    logits = torch.tensor([[300.0, 0.0, -300.0], [0.0, -200.0, 0.0]])
    for term in (SoftTerm(name), SoftTerm(name, top_k=1)):
        log_p, log_q = logits.log_softmax(-1), logits.flip(-1).log_softmax(-1)
        if term.truncated:
            log_p, _ = one_tail(log_p, log_q, term)
        value, slope = divergence_and_slope(log_p, log_q, term)
        assert value.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_have_nothing_to_learn(name):
    _, _, hidden, head, labels = inputs(10, 55)
    options = {"hard_weight": 0.0, "soft_weight": 1.0, "divergence": name}
    total, parts, *gradients = with_gradients(linear_distillation_loss, hidden, head, hidden, head, labels, **options)
    assert abs(parts["kl"]) < 1e-5 and (name == "forward_kl" or abs(total) < 1e-5)
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_a_long_nucleus_is_found_though_few_tokens_are_tried_first():
    log_p = (torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) / 4).log_softmax(-1)
    cut_p, _ = one_tail(log_p, torch.full((3, 5000), 1 / 5000).log(), SoftTerm(top_p=0.9))
    for row, cut_row in zip(log_p, cut_p, strict=True):
        sorted_p = row.double().exp().sort(descending=True).values
        enough = int((sorted_p.cumsum(0) < 0.9).sum()) + 1
        kept = cut_row == row
        assert kept.sum() == enough > 2048 and torch.equal(kept, row >= row.sort(descending=True).values[enough - 1])


def test_a_part_of_weight_zero_is_measured_where_asked_for():
    models = inputs(9, 40)
    for weights in ({"hard_weight": 0.0, "soft_weight": 0.8}, {"hard_weight": 0.8, "soft_weight": 0.0}):
        for tau in (1.0, 2.0):
            total, parts, *gradients = with_gradients(linear_distillation_loss, *models, **weights, temperature=tau)
            both = with_gradients(linear_distillation_loss, *models, **weights, temperature=tau, zero_parts=True)
            assert both[1].keys() == {"hard", "soft", "kl"} > parts.keys()
            torch.testing.assert_close(both[0], total)
            torch.testing.assert_close(list(both[2:]), gradients)
            _, wanted, *_ = exact(*models, **weights, temperature=tau)
            for name, part in both[1].items():
                torch.testing.assert_close(part.double(), wanted[name], rtol=1e-5, atol=1e-5)
    total, parts, *gradients = with_gradients(
        linear_distillation_loss, *models, hard_weight=0.0, soft_weight=0.0, temperature=2.0
    )
    assert total == 0 and not parts and not any(gradient.any() for gradient in gradients)


def test_a_sum_is_narrowed_in_its_own_memory(monkeypatch):
    monkeypatch.setattr("minima.losses.linear._NARROWED_ELEMENTS", 10)
    for shape in ((1, 1), (5, 7), (4, 10), (11, 30)):
        wide = torch.randn(shape)
        wanted, place = wide.bfloat16(), wide.data_ptr()
        found = narrowed(wide, torch.bfloat16)
        assert torch.equal(found, wanted) and found.data_ptr() == place and found.is_contiguous()
    assert narrowed(wide, torch.float32) is wide


def test_recipe_and_losses_know_the_same_divergences():
    assert get_args(Divergence) == get_args(DivergenceName) == DIVERGENCES


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"divergence": "kl"}, "divergence 'kl'"),
        ({"beta": 1.0}, "beta 1.0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"chunk_tokens": 0}, "chunk_tokens 0"),
        ({"chunk_tokens": -1}, "chunk_tokens -1"),
        ({"kernel": "fast"}, "kernel 'fast'"),
        ({"top_k": 3, "kernel": "triton"}, "kernel 'triton' with top_k"),
    ],
)
def test_what_is_out_of_range_is_named(wrong, said):
    with pytest.raises(MinimaError, match=said):
        linear_distillation_loss(*inputs(4, 9), **wrong)


def test_a_top_p_of_one_keeps_all():
    given = inputs(4, 9)
    assert linear_distillation_loss(*given, top_p=1.0).total == linear_distillation_loss(*given).total


def test_the_top_tokens_are_the_same_where_fractions_may_not_be_added_up(monkeypatch):
    """On a GPU PyTorch refuses to add up fractions along a row once it has to be deterministic."""
    log_p = torch.randn(7, 900, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    mass = log_p.double().exp().sort(-1, descending=True)
    wanted = torch.zeros_like(log_p, dtype=torch.bool)
    before = mass.values.cumsum(-1) - mass.values
    wanted.scatter_(-1, mass.indices, before < 0.8)
    own = torch.Tensor.cumsum

    def refusing(tensor, *args, **kwargs):
        assert not tensor.is_floating_point()
        return own(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cumsum", refusing)
    assert _top(log_p, SoftTerm(top_p=0.8)).equal(wanted)


def test_a_row_whose_nucleus_is_long_is_not_cut_short_by_others_whose_are_not():
    peaked, flat = torch.zeros(5000), torch.zeros(5000)
    peaked[7] = 30.0
    log_p_RV = torch.stack([peaked, flat]).log_softmax(-1)
    kept_RV = _top(log_p_RV, SoftTerm(top_p=0.9))
    assert kept_RV.sum(-1).tolist() == [1, 4500]


@pytest.mark.parametrize("wrong", [{"alpha": 1.0}, {"beta": 0.0}, {"alpha": float("nan")}])
def test_the_ends_of_a_mixture_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(MinimaError, match=f"{name} {wrong[name]}"):
        linear_distillation_loss(*inputs(4, 9), **wrong)
