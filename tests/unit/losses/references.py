"""The losses written down once more, naively: all logits at once, float64, autograd's gradients."""

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation")


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum()


def divergence(name: str, p: Tensor, q: Tensor, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    """Of a teacher's probabilities from a student's, as the publications have it; the sum over rows."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jensen_shannon":
        middle = beta * p + (1 - beta) * q
        return beta * kl(p, middle) + (1 - beta) * kl(q, middle)
    if name == "skew_forward_kl":
        return kl(p, alpha * p + (1 - alpha) * q)
    if name == "skew_reverse_kl":
        return kl(q, alpha * q + (1 - alpha) * p)
    return (p - q).abs().sum() / 2


def cut(p: Tensor, q: Tensor, top_k: int | None, top_p: float | None) -> list[tuple[Tensor, Tensor]]:
    """Each row's teacher and student over the kept tokens and the tail, where there is one."""
    pairs = []
    for row_p, row_q in zip(p, q, strict=True):
        order = row_p.argsort(descending=True).tolist()
        kept = order[:top_k] if top_k is not None else order
        if top_p is not None:
            mass, enough = 0.0, []
            for token in kept:
                enough.append(token)
                mass += float(row_p[token].detach())
                if mass >= top_p:
                    break
            kept = enough
        rest = [token for token in order if token not in set(kept)]
        tails = [row[rest].sum().view(1) for row in (row_p, row_q)] if rest else [row_p[:0], row_q[:0]]
        pairs.append((torch.cat([row_p[kept], tails[0]]), torch.cat([row_q[kept], tails[1]])))
    return pairs


def dense(
    student, student_head, teacher, teacher_head, labels, *, hard_weight=0.5, soft_weight=0.5, temperature=1.0,
    divergence="forward_kl", beta=0.5, alpha=0.1, top_k=None, top_p=None,
):  # fmt: skip
    """Total, and the parts hard, soft and kl."""
    keep = labels != -100
    logits, target = (student @ student_head.T)[keep], (teacher @ teacher_head.T)[keep]
    hard = -logits.log_softmax(-1).gather(1, labels[keep][:, None]).sum()
    q, p = (logits / temperature).softmax(-1), (target / temperature).softmax(-1)
    pairs = [(p, q)] if top_k is None and top_p is None else cut(p, q, top_k, top_p)
    soft = sum(globals()["divergence"](divergence, a, b, beta, alpha) for a, b in pairs)
    if divergence == "forward_kl":  # the cross-entropy
        soft = soft + sum(torch.special.entr(a).sum() for a, _ in pairs)
    soft = soft * temperature**2
    return hard_weight * hard + soft_weight * soft, {"hard": hard, "soft": soft, "kl": kl(p, q)}


def inputs(tokens: int, vocabulary: int, dtype=torch.float32, seed: int = 0, device: str = "cpu"):
    """Hidden states and heads of both models, with logits of a standard deviation of 2, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[1::3] = -100
    return (
        normal(tokens, 12), normal(vocabulary, 12, scale=2 / math.sqrt(12)),
        normal(tokens, 20), normal(vocabulary, 20, scale=2 / math.sqrt(20)), labels.to(device),
    )  # fmt: skip


def with_gradients(loss, student, head, *others, **settings):
    """Total and parts, and the gradients of 0.37 times the total for the student's hidden states and head."""
    student, head = student.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    found = loss(student, head, *others, **settings)
    total, parts = (found.total, found.parts) if hasattr(found, "parts") else found
    (total * 0.37).backward()
    return total.detach(), parts, student.grad, head.grad


def exact(student, head, teacher, teacher_head, labels, **settings):
    """`dense` of the same numbers in float64."""
    return with_gradients(dense, *(x.double() for x in (student, head, teacher, teacher_head)), labels, **settings)


def models_apart(nats: float, dtype=torch.bfloat16, tokens: int = 48, vocabulary: int = 1500, width: int = 64):
    """Hidden states and heads of a student and a teacher whose mean KL is so large, in `dtype` to the bit."""
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 2 / math.sqrt(width))
    sizes = (tokens, vocabulary)
    teacher, noise = (
        [torch.randn(size, width, generator=generator, dtype=torch.float64) * scale
         for size, scale in zip(sizes, scales, strict=True)]
        for _ in range(2)
    )  # fmt: skip
    teacher = [tensor.to(dtype) for tensor in teacher]
    low, high = 0.0, 2.0
    for _ in range(30):
        middle = (low + high) / 2
        student = [(a.double() + middle * b).to(dtype) for a, b in zip(teacher, noise, strict=True)]
        p, q = ((hidden.double() @ head.double().T).softmax(-1) for hidden, head in (teacher, student))
        low, high = (low, middle) if kl(p, q) / tokens > nats else (middle, high)
    assert abs(float(kl(p, q)) / tokens / nats - 1) < 0.01
    return student[0], student[1], teacher[0], teacher[1], torch.zeros(tokens, dtype=torch.int64)
