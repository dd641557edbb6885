"""Log-probabilities in chunks against a dense float64 reference: value, both gradients, ignored labels, memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minima.losses import linear_token_log_probs

# Relative to the largest magnitude of the reference; see test_linear_distillation.py for what bfloat16 leaves.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


def inputs(tokens: int, vocabulary: int, width: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, labels of which some are ignored, and what comes from above in the backward pass."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_ND = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    head_VD = (torch.randn(vocabulary, width, generator=generator) * 0.5).to(dtype).requires_grad_()
    labels_N = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels_N[torch.rand(tokens, generator=generator) < 0.3] = -100
    labels_N[0] = 1
    return hidden_ND, head_VD, labels_N, torch.randn(tokens, generator=generator)


def dense(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The same with all logits at once."""
    log_probs_NV = (hidden_ND @ head_VD.T).log_softmax(-1)
    return log_probs_NV.gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1) * (labels_N != -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(1, 2, 1024), (37, 101, 8), (64, 33, 64), (65, 257, 7)])
def test_values_and_gradients_equal_dense_float64(tokens, vocabulary, chunk, dtype):
    hidden_ND, head_VD, labels_N, above_N = inputs(tokens, vocabulary, 13, dtype)
    found_N = linear_token_log_probs(hidden_ND, head_VD, labels_N, chunk_tokens=chunk)
    found_N.backward(above_N)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, head_VD)]
    wanted_N = dense(*exact, labels_N)
    wanted_N.backward(above_N.double())
    assert found_N.dtype == torch.float32
    torch.testing.assert_close(found_N.double(), wanted_N, rtol=1e-6, atol=2e-6)
    for found, wanted in zip((hidden_ND.grad, head_VD.grad), (exact[0].grad, exact[1].grad), strict=True):
        assert found.dtype == dtype
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def test_ignored_tokens_give_zero_even_when_not_finite():
    hidden_ND, head_VD, labels_N, above_N = inputs(24, 31, 5)
    ignored_N = labels_N == -100
    with torch.no_grad():
        hidden_ND[ignored_N] = float("inf")
    found_N = linear_token_log_probs(hidden_ND, head_VD, labels_N, chunk_tokens=7)
    assert ignored_N.any() and not found_N[ignored_N].any() and found_N.isfinite().all()
    found_N.backward(above_N)
    assert not hidden_ND.grad[ignored_N].any() and hidden_ND.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_it_rounds_nothing(dtype):
    hidden_ND, head_VD, labels_N, above_N = inputs(37, 101, 13, dtype)
    found = []
    for around in (False, True):
        hidden_ND.grad = head_VD.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            log_probs_N = linear_token_log_probs(hidden_ND, head_VD, labels_N, chunk_tokens=8)
            log_probs_N.backward(above_N)
        found.append((log_probs_N.detach(), hidden_ND.grad, head_VD.grad))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found, strict=True))


def test_only_what_needs_a_gradient_gets_one():
    hidden_ND, head_VD, labels_N, above_N = inputs(20, 31, 5)
    linear_token_log_probs(hidden_ND, head_VD.detach(), labels_N).backward(above_N)
    wanted = hidden_ND.grad.clone()
    linear_token_log_probs(hidden_ND.detach(), head_VD, labels_N).backward(above_N)
    assert hidden_ND.grad.equal(wanted) and head_VD.grad.any()
    assert linear_token_log_probs(hidden_ND.detach(), head_VD.detach(), labels_N).grad_fn is None


def test_the_head_may_be_taken_apart_between_the_passes():
    """What ZeRO-3 does: the parameter's storage is replaced by an empty one once the forward is over."""
    hidden_ND, head_VD, labels_N, above_N = inputs(20, 31, 5)
    linear_token_log_probs(hidden_ND, head_VD, labels_N).backward(above_N)
    wanted, hidden_ND.grad, whole = hidden_ND.grad, None, head_VD.detach().clone()
    found_N = linear_token_log_probs(hidden_ND, head_VD, labels_N)
    head_VD.grad, head_VD.data = None, torch.empty(0)
    with torch.no_grad():
        node = found_N.grad_fn
        assert [tensor.shape for tensor in node.saved_tensors][1] == whole.shape
    head_VD.data = torch.zeros_like(whole)  # and gathered into another one for the backward
    found_N.backward(above_N)
    assert hidden_ND.grad.equal(wanted)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def test_neither_pass_makes_more_than_a_chunk_of_logits():
    tokens, vocabulary, chunk = 256, 997, 16
    hidden_ND, head_VD, labels_N, above_N = inputs(tokens, vocabulary, 8)
    kept: list[int] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
        Largest() as seen,
    ):
        linear_token_log_probs(hidden_ND, head_VD, labels_N, chunk_tokens=chunk).backward(above_N)
    assert seen.elements == chunk * vocabulary
    assert sum(kept) == tokens * 8 + vocabulary * 8 + 3 * tokens, "hidden states, head, and three numbers a token"
