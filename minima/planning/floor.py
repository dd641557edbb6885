"""The least that a distillation step must compute, in FLOPs per token."""

from typing import Literal

from minima.models.shape import ModelShape


def model_flops_per_token(student: ModelShape, teacher: ModelShape | None, sequence_length: int) -> float:
    """FLOPs per token that the models need: the student's forward and backward, and the teacher's forward, if any.

    Both heads count, since the loss needs the logits of both.
    """
    frozen = teacher.forward_flops_per_token(sequence_length) if teacher is not None else 0.0
    return student.training_flops_per_token(sequence_length) + frozen


def executed_flops_per_token(
    student: ModelShape,
    teacher: ModelShape | None,
    sequence_length: int,
    checkpointing: Literal["none", "selective", "full"] = "full",
) -> float:
    """FLOPs per token that are executed: with full recomputation, the student's layers run forward once more.

    The student's head does not, because the loss computes its gradient in the forward pass. Selective recomputation
    repeats no matrix product.
    """
    flops = model_flops_per_token(student, teacher, sequence_length)
    if checkpointing == "full":
        head = 2.0 * student.vocabulary_size * student.hidden_size
        flops += student.forward_flops_per_token(sequence_length) - head
    return flops
