"""The chunked losses against a dense float64 reference: value, both gradients, odd shapes, ignored labels, memory."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import minima.losses.linear_distillation as module
from minima.errors import MinimaError, VocabularyMismatch
from minima.losses import (
    linear_agreement,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_token_log_probs,
)
from minima.losses.eager import losses_and_gradient as eager
from minima.losses.linear import add_gradients, float_logits

# Relative to the largest magnitude of the reference. bfloat16 inputs are exact in the reference; what is left is the
# rounding of the gradient to bfloat16 (2^-8), twice: as it enters the matrix product and as it leaves.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
LOSS_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6}


def inputs(tokens: int, vocabulary: int, width: int, teacher_width: int, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    return (
        normal(tokens, width), normal(vocabulary, width, scale=0.5),
        normal(tokens, teacher_width), normal(vocabulary, teacher_width, scale=0.5), labels,
    )  # fmt: skip


def dense(student, student_head, teacher, teacher_head, labels, hard, soft, tau):
    """The same loss with all logits at once, in float64."""
    logits, target = student @ student_head.T, teacher @ teacher_head.T
    keep = labels != -100
    log_p = logits.log_softmax(-1)[keep]
    log_q, log_t = (logits / tau).log_softmax(-1)[keep], (target / tau).log_softmax(-1)[keep]
    hard_sum = -log_p.gather(1, labels[keep][:, None]).sum()
    soft_sum = -(log_t.exp() * log_q).sum() * tau**2
    kl = (log_t.exp() * (log_t - log_q)).sum()
    return hard * hard_sum + soft * soft_sum, hard_sum, soft_sum, kl


def check_gradient(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hard", "soft", "tau"), [(0.5, 0.5, 1.0), (0.3, 0.7, 2.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.5)])
@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(1, 2, 1024), (37, 101, 8), (64, 33, 64), (65, 257, 7)])
def test_distillation_equals_dense_float64(tokens, vocabulary, chunk, hard, soft, tau, dtype):
    student, head, teacher, teacher_head, labels = inputs(tokens, vocabulary, 13, 17, dtype)
    labels[0] = 1
    student.requires_grad_(), head.requires_grad_()
    loss = linear_distillation_loss(
        student, head, teacher, teacher_head, labels,
        hard_weight=hard, soft_weight=soft, temperature=tau, chunk_tokens=chunk,
    )  # fmt: skip
    (loss.total * 0.37).backward()

    exact = [tensor.detach().double() for tensor in (student, head, teacher, teacher_head)]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    total, hard_sum, soft_sum, kl = dense(*exact, labels, hard, soft, tau)
    (total * 0.37).backward()

    assert loss.total.dtype == torch.float32 and loss.count == (labels != -100).sum()
    torch.testing.assert_close(loss.total.double(), total, rtol=LOSS_TOLERANCE[dtype], atol=1e-6)
    wanted = ({"hard": hard_sum} if hard else {}) | ({"soft": soft_sum, "kl": kl} if soft else {})
    assert loss.parts.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(loss.parts[name].double(), value, rtol=2e-5, atol=1e-5)
        assert not loss.parts[name].requires_grad
    check_gradient(student.grad, exact[0].grad, dtype)
    check_gradient(head.grad, exact[1].grad, dtype)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_autocast_around_it_rounds_nothing(divergence):
    """As other trainers call it: their `bf16` puts one around the whole step."""
    student, head, *fixed = inputs(37, 101, 13, 11)
    student.requires_grad_(), head.requires_grad_()
    found = []
    for around in (False, True):
        student.grad = head.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            loss = linear_distillation_loss(student, head, *fixed, divergence=divergence, chunk_tokens=8)
        loss.total.backward()
        found.append((loss.total.detach(), *loss.parts.values(), student.grad, head.grad))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found, strict=True))


def test_cross_entropy_equals_torch():
    student, head, _, _, labels = inputs(50, 71, 9, 1)
    student.requires_grad_(), head.requires_grad_()
    loss = linear_cross_entropy(student, head, labels, chunk_tokens=16)
    loss.total.backward()
    exact, exact_head = student.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact @ exact_head.T, labels, reduction="sum")
    wanted.backward()
    torch.testing.assert_close(loss.total.double(), wanted, rtol=1e-6, atol=1e-6)
    check_gradient(student.grad, exact.grad, torch.float32)
    check_gradient(head.grad, exact_head.grad, torch.float32)


def test_all_labels_ignored_gives_zero_and_zero_gradients():
    student, head, teacher, teacher_head, labels = inputs(20, 31, 5, 5)
    student.requires_grad_(), head.requires_grad_()
    loss = linear_distillation_loss(student, head, teacher, teacher_head, torch.full_like(labels, -100), chunk_tokens=6)
    loss.total.backward()
    assert loss.total == 0 and loss.count == 0 and all(part == 0 for part in loss.parts.values())
    assert not student.grad.any() and not head.grad.any()


def test_another_ignore_index_may_be_a_token():
    student, head, teacher, teacher_head, labels = inputs(40, 31, 5, 5)
    labels[labels == -100] = 7
    loss = linear_distillation_loss(student, head, teacher, teacher_head, labels, ignore_index=7)
    wanted = linear_distillation_loss(student, head, teacher, teacher_head, labels.masked_fill(labels == 7, -100))
    assert loss.total == wanted.total and loss.count == wanted.count < 40


def test_ignored_tokens_have_no_say_even_when_not_finite():
    student, head, teacher, teacher_head, labels = inputs(24, 31, 5, 5)
    wanted = linear_distillation_loss(student, head, teacher, teacher_head, labels)
    wanted_gradient = torch.autograd.grad(
        linear_distillation_loss(student, head.requires_grad_(), teacher, teacher_head, labels).total, head
    )
    teacher[labels == -100] = student[labels == -100] = float("inf")
    found = linear_distillation_loss(student, head, teacher, teacher_head, labels)
    assert torch.isfinite(found.total) and found.total == wanted.total
    assert torch.equal(*wanted_gradient, *torch.autograd.grad(found.total, head))


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 1024), (37, 16), (64, 7), (5, 3), (0, 16)])
def test_pieces_of_a_chunk_as_a_gpu_has_them_change_nothing(monkeypatch, tokens, chunk):
    given, found, rows = inputs(tokens, 101, 16, 24, torch.bfloat16), [], []

    def counted(hidden_PD: Tensor, *others: Tensor) -> Tensor:
        rows.append(len(hidden_PD))
        return float_logits(hidden_PD, *others)

    monkeypatch.setattr(module, "float_logits", counted)
    for pieces in (1, 4):
        monkeypatch.setitem(module._PIECES, "cpu", pieces)
        rows.clear()
        student, head = (tensor.clone().requires_grad_() for tensor in given[:2])
        loss = linear_distillation_loss(student, head, *given[2:], chunk_tokens=chunk)
        loss.total.backward()
        found.append((loss.total.detach(), *loss.parts.values(), student.grad, head.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert sum(rows) == 2 * tokens and max(rows, default=0) <= -(-min(chunk, tokens) // 4), "of either model"


@pytest.mark.parametrize("needed", [False, True])
def test_a_gradient_is_made_only_where_one_is_asked_for(monkeypatch, needed):
    asked, products = [], []
    monkeypatch.setattr(module, "losses_and_gradient", lambda *given: asked.append(given[-1]) or eager(*given))
    monkeypatch.setattr(module, "add_gradients", lambda *given: products.append(given) or add_gradients(*given))
    student, *others = inputs(20, 31, 5, 5)
    linear_distillation_loss(student.requires_grad_(needed), *others, chunk_tokens=8)
    assert asked == [needed] * 3 and len(products) == 3 * needed


def test_a_frozen_head_gets_no_gradient():
    student, head, teacher, teacher_head, labels = inputs(20, 31, 5, 5)
    student.requires_grad_()
    linear_distillation_loss(student, head, teacher, teacher_head, labels).total.backward()
    assert student.grad.any() and head.grad is None


def test_vocabularies_that_differ_are_refused_with_both_sizes():
    student, head, teacher, teacher_head, labels = inputs(4, 31, 5, 5)
    with pytest.raises(VocabularyMismatch, match=r"(?s)31.*30.*expand") as caught:
        linear_distillation_loss(student, head, teacher, teacher_head[:30], labels)
    assert caught.value.do


def test_agreement_counts_tokens_and_divergence():
    student, head, teacher, teacher_head, labels = inputs(50, 31, 5, 5)
    found = linear_agreement(student, head, teacher, teacher_head, labels, chunk_tokens=11)
    keep = labels != -100
    logits, target = (student @ head.T)[keep].double(), (teacher @ teacher_head.T)[keep].double()
    assert found["count"] == keep.sum()
    assert found["same_top1"] == (logits.argmax(-1) == target.argmax(-1)).sum()
    kl = (target.softmax(-1) * (target.log_softmax(-1) - logits.log_softmax(-1))).sum()
    torch.testing.assert_close(found["kl"], kl, rtol=1e-5, atol=1e-5)
    same = linear_agreement(teacher, teacher_head, teacher, teacher_head, labels)
    assert same["same_top1"] == same["count"] and abs(same["kl"]) < 1e-6


MEMORY = """
import re, torch
from pathlib import Path
from minima.losses import linear_distillation_loss
torch.manual_seed(0)
N, V, D = 16_384, 49_216, 32
student, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
teacher, teacher_head, labels = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
def small(): linear_distillation_loss(student[:8], head, teacher[:8], teacher_head, labels[:8]).total.backward()
small(); student.grad = head.grad = None
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = peak()
linear_distillation_loss(student, head, teacher, teacher_head, labels).total.backward()
print(peak() - before - (N + V) * D * 4)
"""


@pytest.mark.slow
def test_peak_memory_is_a_few_chunks_at_full_size():
    """16,384 tokens x 49,216: dense logits of one model alone are 3.2 GB."""
    output = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    chunk_bytes = 1024 * 49_216 * 4
    assert int(output) < 4 * chunk_bytes, f"{int(output) / chunk_bytes:.2f} chunks"
    assert int(output) > chunk_bytes / 2, "the measurement saw nothing"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({0: (7, 13)}, r"hidden states \[7, 13\] of the student for labels \[8\]"),
        ({2: (9, 17)}, r"hidden states \[9, 17\] of the teacher for labels \[8\]"),
        ({0: (2, 4, 13), 2: (2, 4, 17), 4: (2, 4)}, r"hidden states \[2, 4, 13\] of the student"),
        ({1: (33, 12)}, r"output head \[33, 12\] for hidden states \[8, 13\] of the student"),
        ({3: (33, 13)}, r"output head \[33, 13\] for hidden states \[8, 17\] of the teacher"),
    ],
)
@pytest.mark.parametrize("loss", [linear_distillation_loss, linear_agreement])
def test_tokens_and_widths_that_do_not_belong_together_are_named(loss, wrong, said):
    given = list(inputs(8, 33, 13, 17))
    for place, shape in wrong.items():
        given[place] = torch.zeros(shape, dtype=given[place].dtype)
    with pytest.raises(MinimaError, match=said):
        loss(*given)


@pytest.mark.parametrize("loss", [linear_cross_entropy, linear_token_log_probs])
def test_losses_of_one_model_name_what_does_not_belong_together(loss):
    hidden, head, *_, labels = inputs(8, 33, 13, 17)
    with pytest.raises(MinimaError, match=r"hidden states \[8, 13\] of the model for labels \[7\]"):
        loss(hidden, head, labels[:7])
    for wrong in (0, -1):
        with pytest.raises(MinimaError, match=f"chunk_tokens {wrong}"):
            loss(hidden, head, labels, chunk_tokens=wrong)


def test_agreement_over_chunks_of_no_tokens_is_refused():
    with pytest.raises(MinimaError, match="chunk_tokens -1"):
        linear_agreement(*inputs(8, 33, 13, 17), chunk_tokens=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", [linear_distillation_loss, linear_cross_entropy, linear_token_log_probs])
def test_strides_of_a_head_change_nothing(loss, dtype):
    """A head that is a view, [D, V] transposed, say, as some libraries keep them."""
    student, head, *teacher, labels = inputs(24, 33, 16, 17, dtype)
    models, found = (*teacher, labels) if loss is linear_distillation_loss else (labels.clamp_min(0),), []
    for given in (head, head.t().contiguous().t()):
        hidden, own = student.clone().requires_grad_(), given.detach().requires_grad_()
        value = loss(hidden, own, *models)
        (value.sum() if isinstance(value, Tensor) else value.total).backward()
        found.append((hidden.grad, own.grad))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"top_k": True}, "top_k True"),
        ({"top_k": 0}, "top_k 0"),
        ({"chunk_tokens": 1.5}, "chunk_tokens 1.5"),
        ({"chunk_tokens": True}, "chunk_tokens True"),
        ({"hard_weight": float("nan")}, "hard_weight nan"),
        ({"soft_weight": -1.0}, "soft_weight -1.0"),
        ({"soft_weight": None}, "soft_weight None"),
        ({"temperature": None}, "temperature None"),
        ({"temperature": "1"}, "temperature '1'"),
        ({"top_p": "x"}, "top_p 'x'"),
        ({"hard_weight": float("inf")}, "hard_weight inf"),
        ({"kernel": "cuda"}, "kernel 'cuda'"),
        ({"kernel": "triton", "top_k": 3}, "kernel 'triton' with top_k or top_p"),
    ],
)
def test_settings_that_mean_nothing_are_refused(option, said):
    with pytest.raises(MinimaError, match=said):
        linear_distillation_loss(*inputs(8, 33, 13, 17), **option)


def test_a_kernel_for_gpus_is_refused_on_a_cpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("minima.losses.triton_kernels.interpreted", lambda: False)
    with pytest.raises(MinimaError, match="kernel 'triton', but the tensors are on the cpu"):
        linear_distillation_loss(*inputs(8, 33, 13, 17), kernel="triton")


@pytest.mark.parametrize("wrong", [33, -1, -101])
@pytest.mark.parametrize(
    "loss", [linear_distillation_loss, linear_cross_entropy, linear_token_log_probs, linear_agreement]
)
def test_labels_of_another_vocabulary_are_refused_with_its_size(loss, wrong):
    *models, labels = inputs(8, 33, 13, 17)
    given = models[:2] if loss in (linear_cross_entropy, linear_token_log_probs) else models
    loss(*given, labels)
    labels[3] = wrong
    with pytest.raises(MinimaError, match=rf"labels from .*{wrong}.* for a vocabulary of 33 tokens"):
        loss(*given, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_labels_that_are_no_token_ids_are_refused(dtype):
    *models, labels = inputs(8, 33, 13, 17)
    with pytest.raises(MinimaError, match=f"labels of {dtype}"):
        linear_distillation_loss(*models, labels.to(dtype))


class _Student(torch.nn.Module):
    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.head_VD = torch.nn.Parameter(head.detach().clone())

    def forward(self, *models: Tensor) -> Tensor:
        return linear_distillation_loss(models[0], self.head_VD, *models[1:]).total


def test_a_sharded_head_is_refused_with_the_way_out():
    """FSDP's parameters outside of its modules' forward."""
    student, head, *rest = inputs(8, 33, 13, 17)
    head.requires_grad_()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        module = fully_shard(_Student(head), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(MinimaError, match=r"(?s)head of the student.*inside the module's forward"):
            linear_distillation_loss(student, module.head_VD, *rest)
        module(student, *rest).backward()
        linear_distillation_loss(student, head, *rest).total.backward()
        assert torch.equal(module.head_VD.grad.to_local(), head.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
def test_a_kept_graph_gives_the_same_gradients_again(kept, dtype):
    student, head, teacher, teacher_head, labels = inputs(9, 13, 8, 12, dtype)
    leaves = [t.requires_grad_() for t in (student, head)]
    total = linear_distillation_loss(student, head, teacher, teacher_head, labels, chunk_tokens=4).total
    first = torch.autograd.grad(total / 7, leaves, retain_graph=True)
    values = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(total / 7, leaves, retain_graph=kept)
    for one, other, value in zip(first, second, values, strict=True):
        assert torch.equal(one, value), "the second pass changed what the first had returned"
        assert torch.equal(other, value)
        assert torch.count_nonzero(value) > 0


@pytest.mark.parametrize("loss", [linear_cross_entropy, linear_token_log_probs])
def test_a_second_derivative_is_refused_rather_than_zero(loss):
    student, head, _, _, labels = inputs(9, 13, 8, 12)
    found = loss(student.requires_grad_(), head, labels)
    total = found.total if loss is linear_cross_entropy else found.sum()
    with pytest.raises(MinimaError, match="create_graph=True"):
        torch.autograd.grad(total, student, create_graph=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: {"ignore_index": None}, "ignore_index None"),
        (lambda given: {"ignore_index": 1.5}, "ignore_index 1.5"),
        (lambda given: {"labels_N": given["labels_N"].tolist()}, "labels of <class 'list'>"),
        (lambda given: {"teacher_hidden_NE": given["teacher_hidden_NE"].long()}, "hidden states of torch.int64"),
        (lambda given: {"student_head_VD": given["student_head_VD"].to(torch.int8)}, "output head of torch.int8"),
    ],
)
def test_what_is_of_another_kind_is_named(change, said):
    names = ("student_hidden_ND", "student_head_VD", "teacher_hidden_NE", "teacher_head_VE", "labels_N")
    given = dict(zip(names, inputs(9, 13, 8, 12), strict=True))
    with pytest.raises(MinimaError, match=said):
        linear_distillation_loss(**(given | change(given)))
