"""What the engine has to equal: one plain PyTorch process, dense logits, no DeepSpeed, no micro-batches."""

from collections.abc import Callable

import torch
from torch import Tensor

from minima.engine.schedule import Schedule
from minima.models.causal_lm import load_plain
from minima.models.weights import WeightSource
from tests.distributed.tiny import step_documents, step_tokens, student_source, teacher_source
from tests.pairs import pair_losses


def plain_training(
    settings,
    hard: float,
    soft: float,
    temperature: float,
    packed: bool = False,
    teacher_weights: WeightSource | None = None,
) -> list[dict[str, float]]:
    """Losses and gradient norms of the same run, step by step; packed rows run document by document."""
    student, teacher = load_plain(student_source()).train(), load_plain(teacher_weights or teacher_source())

    def loss_of(step: int) -> Tensor:
        tokens_BT, valid_BT = step_tokens(step)
        return _mean_loss(student, teacher, _pieces(tokens_BT, valid_BT, step, packed), hard, soft, temperature)

    return _train(settings, student, loss_of)


def plain_preference(settings, reference: WeightSource, blocks: list[list[int]], seed: int, **kind) -> list[dict]:
    """The same of preference optimisation, pair by pair, from the blocks of each step."""
    student, frozen = load_plain(student_source()).train(), load_plain(reference)
    return _train(
        settings, student, lambda step: torch.stack([*pair_losses(student, frozen, blocks[step], seed, **kind)]).mean()
    )


def _train(settings, student: torch.nn.Module, loss_of: Callable[[int], Tensor]) -> list[dict[str, float]]:
    groups = [
        {"params": [p for p in student.parameters() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in student.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon)
    schedule = Schedule(settings.steps, settings.learning_rate, settings.warmup_steps, "cosine", 0.1)
    records = []
    for step in range(settings.steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        records.append({"step": step + 1, "loss": loss.item(), "gradient_norm": norm.item()})
    return records


def _pieces(tokens_BT: Tensor, valid_BT: Tensor, step: int, packed: bool) -> list[tuple[Tensor, Tensor]]:
    """What one forward pass sees: the whole batch, or each document alone."""
    if not packed:
        return [(tokens_BT, valid_BT)]
    pieces: list[tuple[Tensor, Tensor]] = []
    for tokens, valid, documents in zip(tokens_BT, valid_BT, step_documents(step), strict=True):
        lengths = documents.unique_consecutive(return_counts=True)[1].tolist()
        for piece, keep in zip(tokens.split(lengths), valid.split(lengths), strict=True):
            pieces.append((piece[None], keep[None]))
    return pieces


def _logits(model, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    kept = [model(tokens).logits[:, :-1].flatten(0, 1)[valid[:, 1:].flatten()] for tokens, valid in pieces]
    return torch.cat(kept)


def _mean_loss(student, teacher, pieces: list[tuple[Tensor, Tensor]], hard, soft, temperature) -> Tensor:
    labels_N = torch.cat([tokens[:, 1:].flatten()[valid[:, 1:].flatten()] for tokens, valid in pieces])
    logits_NV = _logits(student, pieces)
    loss = hard * torch.nn.functional.cross_entropy(logits_NV, labels_N)
    if soft:
        with torch.no_grad():
            target_NV = _logits(teacher, pieces)
        log_q_NV = (logits_NV / temperature).log_softmax(-1)
        cross_N = -((target_NV / temperature).softmax(-1) * log_q_NV).sum(-1)
        loss = loss + soft * temperature**2 * cross_N.mean()
    return loss
