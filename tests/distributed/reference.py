"""What the engine has to equal: one plain PyTorch process, dense logits, no DeepSpeed, no micro-batches."""

import torch
from torch import Tensor

from minima.engine.schedule import Schedule
from minima.models.causal_lm import load_plain
from tests.distributed.tiny import step_tokens, student_source, teacher_source


def plain_training(settings, hard: float, soft: float, temperature: float) -> list[dict[str, float]]:
    """Losses and gradient norms of the same run, step by step."""
    student, teacher = load_plain(student_source()).train(), load_plain(teacher_source())
    groups = [
        {"params": [p for p in student.parameters() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in student.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon)
    schedule = Schedule(settings.steps, settings.learning_rate, settings.warmup_steps, "cosine", 0.1)
    records = []
    for step in range(settings.steps):
        tokens_BT, valid_BT = step_tokens(step)
        loss = _mean_loss(student, teacher, tokens_BT, valid_BT, hard, soft, temperature)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        records.append({"step": step + 1, "loss": loss.item(), "gradient_norm": norm.item()})
    return records


def _mean_loss(student, teacher, tokens_BT: Tensor, valid_BT: Tensor, hard, soft, temperature) -> Tensor:
    labels_N, keep_N = tokens_BT[:, 1:].flatten(), valid_BT[:, 1:].flatten()
    logits_NV = student(tokens_BT).logits[:, :-1].flatten(0, 1)[keep_N]
    loss = hard * torch.nn.functional.cross_entropy(logits_NV, labels_N[keep_N])
    if soft:
        with torch.no_grad():
            target_NV = teacher(tokens_BT).logits[:, :-1].flatten(0, 1)[keep_N]
        log_q_NV = (logits_NV / temperature).log_softmax(-1)
        cross_N = -((target_NV / temperature).softmax(-1) * log_q_NV).sum(-1)
        loss = loss + soft * temperature**2 * cross_N.mean()
    return loss
