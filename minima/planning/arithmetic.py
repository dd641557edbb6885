"""Tokens, steps, parameters and FLOPs of a training stage, from shapes alone."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from minima.errors import RecipeError
from minima.models.shape import ModelShape
from minima.recipe.training import Training

CHECKPOINT_BYTES = 12  # per parameter: the master weight and both of Adam's moments, each in float32


@dataclass(frozen=True)
class TrainingPlan:
    """The size of a training stage."""

    steps: int  # optimiser steps
    sequences: int  # whole sequences that are trained on, over all steps
    sequence_length: int  # tokens per sequence
    batch_sequences: int  # sequences per step
    last_step_sequences: int  # whole sequences in the last step; the rest of it is filled with fully masked ones
    leftover_tokens: int  # tokens that the recipe asks for beyond the last whole block
    warmup_steps: int  # steps of linear warm-up

    @property
    def tokens(self) -> int:
        """Tokens that are trained on, in whole blocks."""
        return self.sequences * self.sequence_length

    @property
    def masked_sequences(self) -> int:
        """Fully masked sequences that fill the last step, so that no rank does less than another."""
        return self.batch_sequences - self.last_step_sequences


def plan_training(training: Training, sequence_length: int, blocks: int | None) -> TrainingPlan | None:
    """Steps and tokens of a training stage.

    Args:
        sequence_length: tokens per block of its data.
        blocks: training blocks of its data; None if not known yet.

    Returns:
        The plan, or None if it depends on the number of blocks (`epochs`) and that is not known.
    """
    if training.epochs is not None and blocks is None:
        return None
    sequences = training.total_sequences(sequence_length, blocks or 0)
    steps = training.total_steps(sequence_length, blocks or 0)
    return TrainingPlan(
        steps=steps,
        sequences=sequences,
        sequence_length=sequence_length,
        batch_sequences=training.batch_sequences,
        last_step_sequences=sequences - (steps - 1) * training.batch_sequences if steps else 0,
        leftover_tokens=training.tokens % sequence_length if training.tokens is not None else 0,
        warmup_steps=training.warmup(steps),
    )


def training_flops(
    plan: TrainingPlan, student: ModelShape, teacher: ModelShape | None = None, teacher_sequences: int | None = None
) -> float:
    """FLOPs of the whole stage: forward and backward of the student, forward of the frozen model.

    Args:
        teacher: the frozen model, a teacher or a reference; None if none runs.
        teacher_sequences: sequences that the frozen model reads; those that are trained on if not given.
    """
    flops = student.training_flops_per_token(plan.sequence_length) * plan.tokens
    if teacher is not None:
        sequences = plan.sequences if teacher_sequences is None else teacher_sequences
        flops += teacher.forward_flops_per_token(plan.sequence_length) * sequences * plan.sequence_length
    return flops


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


def checkpoint_bytes(training: Training, parameters: int, steps: int | None, named: Collection[int] = ()) -> int | None:
    """The most bytes that a training stage's checkpoints take at any one time.

    Args:
        steps: steps of the whole stage; None if not known yet.
        named: steps whose checkpoints stay because other stages read them.

    Returns:
        None if it depends on the number of steps (checkpoints accumulate) and that is not known.
    """
    counts = []
    patient = training.patience is not None
    every, evaluated = training.checkpoint_every_steps, training.evaluate_every_steps
    if steps is not None:
        # With patience, one is also written at each held-out loss; where both periods meet, it is the same one.
        both = steps // evaluated - steps // math.lcm(every, evaluated) if patient else 0
        last = steps % every != 0 and not (patient and steps % evaluated == 0)  # written at the end in any case
        counts.append(steps // every + both + last)
    stay = training.keep_every_steps
    if training.keep_checkpoints and (steps is not None or not stay):
        # The oldest is removed once the new one is complete; with patience, the best one is kept besides the newest.
        count = training.keep_checkpoints + 1 + patient + len(named)
        periods = [every, *([evaluated] if patient else [])] if stay else []
        counts.append(count + sum((steps or 0) // math.lcm(stay, period) for period in periods))
    return min(counts) * CHECKPOINT_BYTES * parameters if counts else None


def describe_shape(shape: ModelShape) -> str:
    """A shape in one line, starting with its parameters."""
    key_value = f" ({shape.num_key_value_heads} key-value)" if shape.num_key_value_heads != shape.num_heads else ""
    return (
        f"{shape.parameters:,} parameters ({shape.non_embedding_parameters:,} without embeddings): {shape.family}, "
        f"{shape.num_layers} layers, width {shape.hidden_size}, {shape.num_heads} heads{key_value} of "
        f"{shape.head_size}, {shape.intermediate_size} neurons, vocabulary {shape.vocabulary_size:,}"
        f"{', tied' if shape.tied else ''}"
    )


def check_batch(name: str, training: Training, ranks: int) -> None:
    """Refuse a batch that the ranks cannot share evenly.

    Raises:
        RecipeError: names the rank counts that can.
    """
    batch = training.batch_sequences
    if batch % ranks == 0:
        return
    counts = [count for count in range(1, batch + 1) if batch % count == 0]
    raise RecipeError(
        f"stages.{name}: batch_sequences {batch} is not divisible by {ranks} ranks",
        "every rank runs the same number of sequences in a step, and the batch, which affects the result, is fixed",
        f"use {_some(counts)} ranks, or a batch that is a multiple of {ranks}",
    )


def check_length(name: str, training: Training, plan: TrainingPlan) -> None:
    """Refuse a stage that would train on less than one sequence.

    Raises:
        RecipeError: says how much the recipe gives it.
    """
    if plan.steps:
        return
    given = f"tokens {training.tokens:,}" if training.tokens is not None else f"epochs {training.epochs:g}"
    raise RecipeError(
        f"stages.{name}: {given} is less than one sequence of {plan.sequence_length:,} tokens",
        "the stage would have no steps",
        f"give it at least {plan.sequence_length:,} tokens",
    )


def _some(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts[:12])) + (", ..." if len(counts) > 12 else "")
