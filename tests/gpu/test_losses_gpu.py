"""The divergences on a GPU: Triton and eager against float64, and how much memory they take."""

import pytest
import torch

from minima.losses import linear_cross_entropy, linear_distillation_loss
from tests.unit.losses.references import DIVERGENCES, exact, inputs, models_apart, with_gradients

pytestmark = pytest.mark.gpu

# Norm of a gradient's error over its norm. A GPU's exp and log lose a digit more than a CPU's; in bfloat16 it is what
# rounding takes, 5.2e-3 at most (the reverse KL on an H200, by either kernel).
TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.bfloat16: 6e-3}
# Of models that differ much it is nearly flat, and what is left of its slopes has 3e-5 on a CPU at 49,216 tokens, too.
FLAT_TOLERANCE = {"skew_reverse_kl": 1e-4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["triton", "eager"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_divergence_equals_float64(name, kernel, dtype):
    for tokens, vocabulary, hard, soft, tau in (
        (1, 1, 0.0, 1.0, 1.0), (7, 5, 0.3, 0.7, 2.0), (70, 1001, 0.5, 0.5, 1.0), (33, 49_216, 0.0, 1.0, 0.7),
    ):  # fmt: skip
        models = inputs(tokens, vocabulary, dtype, device="cuda")
        options = {"hard_weight": hard, "soft_weight": soft, "temperature": tau, "divergence": name, "beta": 0.3}
        found = with_gradients(linear_distillation_loss, *models, **options, chunk_tokens=16, kernel=kernel)
        wanted = exact(*models, **options)
        torch.testing.assert_close(found[0].double(), wanted[0], rtol=2e-5, atol=1e-5)
        for part, value in found[1].items():
            torch.testing.assert_close(value.double(), wanted[1][part], rtol=5e-5, atol=5e-5)
        for gradient, reference in zip(found[2:], wanted[2:], strict=True):
            error = (gradient.double() - reference).norm()
            tolerance = max(TOLERANCE[dtype], FLAT_TOLERANCE.get(name, 0.0))
            assert error <= tolerance * reference.norm() + 1e-6, error / reference.norm()


@pytest.mark.parametrize("nats", [4.5e-4, 0.01, 1.0])
@pytest.mark.parametrize("kernel", ["triton", "eager"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_stays_right_where_the_models_agree(name, kernel, nats):
    models = [tensor.cuda() for tensor in models_apart(nats)]
    options = {"hard_weight": 0.0, "soft_weight": 1.0, "divergence": name}
    found = with_gradients(linear_distillation_loss, *models, **options, chunk_tokens=16, kernel=kernel)
    for gradient, reference in zip(found[2:], exact(*models, **options)[2:], strict=True):
        assert (gradient.double() - reference).norm() < 0.005 * reference.norm()


@pytest.mark.parametrize("cut", [{"top_k": 64}, {"top_p": 0.9}, {"top_k": 64, "top_p": 0.9}], ids=str)
def test_a_cut_teacher_equals_float64(cut):
    models = inputs(20, 1001, device="cuda")
    for name in DIVERGENCES:
        found = with_gradients(linear_distillation_loss, *models, divergence=name, **cut)
        wanted = exact(*models, divergence=name, **cut)
        for gradient, reference in zip(found[2:], wanted[2:], strict=True):
            assert (gradient.double() - reference).norm() <= TOLERANCE[torch.float32] * reference.norm()


def test_the_cross_entropy_and_ignored_tokens_that_are_not_finite():
    student, head, teacher, teacher_head, labels = inputs(50, 1001, device="cuda")
    found, wanted = (
        with_gradients(linear_cross_entropy, student, head, labels, kernel=kernel) for kernel in ("triton", "eager")
    )
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(list(found[2:]), list(wanted[2:]), rtol=1e-4, atol=1e-6)
    wanted = linear_distillation_loss(student, head, teacher, teacher_head, labels)
    teacher[labels == -100] = float("inf")
    assert torch.equal(linear_distillation_loss(student, head, teacher, teacher_head, labels).total, wanted.total)


@pytest.mark.parametrize("tokens", [4096, 16_384])
def test_peak_memory_is_a_few_chunks(tokens):
    vocabulary, width, chunk = 49_216, 256, 1024
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)

    student, head = normal(tokens, width).requires_grad_(), normal(vocabulary, width).requires_grad_()
    teacher, teacher_head = normal(tokens, width), normal(vocabulary, width)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator, device="cuda")
    linear_distillation_loss(student, head, teacher, teacher_head, labels).total.backward()
    student.grad = head.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_distillation_loss(student, head, teacher, teacher_head, labels, chunk_tokens=chunk).total.backward()
    gradients = tokens * width * 2 + vocabulary * width * 4
    extra = torch.cuda.max_memory_allocated() - before - gradients
    # A quarter of both models' logits in float32, and the whole chunk's gradient in bfloat16: its float32 logits once.
    assert extra < 1.2 * chunk * vocabulary * 4, f"{extra / (chunk * vocabulary * 4):.2f} chunks"
