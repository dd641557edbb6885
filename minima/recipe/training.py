"""The settings that all training stages share: batch, length, optimiser, schedule, precision, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from minima.errors import RecipeError
from minima.recipe.base import ModelInput, Strict

Beta = Annotated[float, Field(ge=0, lt=1)]  # at 1 a moving average would never move


class Training(Strict):
    """Batch size, accumulation, clipping, precision, optimiser and schedule, which are set here and nowhere else.

    Attributes:
        batch_sequences: sequences per optimiser step, over all ranks and micro-batches. A sequence is a block of the
            data, which may hold several documents, conversations or pairs.
        micro_batch_sequences: sequences that one rank processes at once. If it does not divide a rank's share of the
            batch, the largest smaller divisor is used. Affects only memory and speed, not the result.
        steps: optimiser steps. Give exactly one of `steps`, `tokens` and `epochs`.
        tokens: training tokens, counted as whole blocks; the last step is filled with masked sequences.
        epochs: passes over the training blocks.
        learning_rate: the peak learning rate.
        warmup_steps: steps of linear warm-up, instead of `warmup_fraction`.
        warmup_fraction: linear warm-up as a fraction of all steps; 1 % as published.
        schedule: of the learning rate, from its peak to the end of the run.
        final_learning_rate_fraction: where `cosine` and `linear` end, as a fraction of the peak.
        weight_decay: AdamW's weight decay; on matrices only, not on norms and biases.
        betas: AdamW's betas.
        epsilon: AdamW's epsilon.
        gradient_clip: maximum global gradient norm; 0 turns clipping off.
        precision: dtype of weights and activations. Master weights, optimiser states and accumulated gradients are
            always float32.
        activation_checkpointing: what the backward pass recomputes to save memory (gradient checkpointing): `none`;
            `selective`, what is cheap (norms, rotary embeddings, activation functions), keeping the outputs of matrix
            products and of attention; `full`, whole layers; `auto`, as little as the memory plan allows.
        compile: compile each decoder layer of student and frozen teacher with `torch.compile`. The first step then
            takes minutes longer.
        kernels: `liger` replaces norms, SwiGLUs and rotary embeddings of student and teacher by liger-kernel's fused
            versions (needs a GPU and the `liger` extra; not for GPT-NeoX and GPT-2, which have neither RMSNorms nor
            SwiGLUs); `stock` leaves the models as they are.
        deterministic: on a GPU, make runs bit-identical, at some cost in speed. On the same
            kind of CPU, they always are.
        checkpoint_every_steps: steps between checkpoints; one is always written at the end.
        keep_checkpoints: how many of the newest checkpoints are kept, besides those that another stage of the recipe
            reads as `NAME@STEP`; 0 keeps all.
        keep_every_steps: also keep the checkpoints at multiples of this number of steps; 0 for none.
        watchdog_seconds: end the job, naming the rank that hangs, after this long without progress in training; 0 for
            never. The default leaves room for a first step that compiles and reads its blocks from a slow disk.
        evaluate_every_steps: steps between measurements of the held-out loss; 0 for never.
        evaluate_sequences: held-out blocks per measurement, the first ones; all when not given. See `held_out_tokens`
            for what the first ones hold.
        patience: stop early after this many held-out losses in a row that are no better than the best one, and leave
            the best one's checkpoint as the newest (later ones are removed, even if another key would keep them). A
            checkpoint is then also written at each held-out loss. No early stopping when not given.
        log_every_steps: steps between log lines; one is also written before each checkpoint and at the end.
        tensorboard: also write TensorBoard events.
        wandb_project: also log to this Weights & Biases project, if `wandb` is installed.
        deepspeed: DeepSpeed JSON for the trained model: a file next to the recipe, or one that ships with minima.
        seed: seed for the order of the blocks and for any random weights.
    """

    batch_sequences: int = Field(gt=0)
    micro_batch_sequences: int = Field(gt=0)
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_fraction: float = Field(default=0.01, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_learning_rate_fraction: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    gradient_clip: float = Field(default=1.0, ge=0)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    compile: bool = False
    kernels: Literal["stock", "liger"] = "stock"
    deterministic: bool = False
    checkpoint_every_steps: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=2, ge=0)
    keep_every_steps: int = Field(default=0, ge=0)
    watchdog_seconds: float = Field(default=1800, ge=0)
    evaluate_every_steps: int = Field(default=0, ge=0)
    evaluate_sequences: int | None = Field(default=None, gt=0)
    patience: int | None = Field(default=None, gt=0)
    log_every_steps: int = Field(default=10, gt=0)
    tensorboard: bool = True
    wandb_project: str | None = None
    deepspeed: str = "student_zero3.json"
    seed: int = 776

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(
                f"a training stage gives {' and '.join(given) or 'none of steps, tokens and epochs'}",
                "exactly one of them sets the length of the run, and with it the schedule",
                "give one of `steps`, `tokens` and `epochs`; an override removes one with `=null`",
            )
        if self.batch_sequences % self.micro_batch_sequences:
            raise RecipeError(
                f"batch_sequences {self.batch_sequences} is not a multiple of "
                f"micro_batch_sequences {self.micro_batch_sequences}",
                "a step is made of whole micro-batches",
                "make batch_sequences a multiple of micro_batch_sequences",
            )
        if self.compile and self.kernels == "liger":
            raise RecipeError(
                "compile: true with kernels: liger",
                "compiling fuses norms and activation functions itself, and cannot trace liger's kernels",
                "choose one of them",
            )
        if self.patience is not None and not self.evaluate_every_steps:
            raise RecipeError(
                f"patience {self.patience} with evaluate_every_steps 0",
                "it counts held-out losses, and none would be measured",
                "set evaluate_every_steps, or leave patience out",
            )
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        # A finished run's recipe writes its defaults out, so a default counts as not given.
        default = type(self).model_fields["warmup_fraction"].default
        if self.warmup_steps is not None and self.warmup_fraction != default:
            raise RecipeError(
                f"warmup_steps {self.warmup_steps} with warmup_fraction {self.warmup_fraction:g}",
                "both set the length of the warm-up, and only the steps would be used",
                "give one of them; an override removes one with `warmup_steps=null` or "
                f"`warmup_fraction={default:g}`, its default",
            )
        if self.schedule == "constant" and self.final_learning_rate_fraction:
            raise RecipeError(
                f"schedule: constant with final_learning_rate_fraction {self.final_learning_rate_fraction:g}",
                "a constant schedule ends at the peak, so the fraction would have no effect",
                "leave it out (an override removes it with `final_learning_rate_fraction=0`), or choose `linear` or "
                "`cosine`",
            )
        if self.evaluate_sequences is not None and not self.evaluate_every_steps:
            raise RecipeError(
                f"evaluate_sequences {self.evaluate_sequences} with evaluate_every_steps 0",
                "nothing is evaluated during training, so it would have no effect",
                "set evaluate_every_steps, or leave evaluate_sequences out (an override removes it with "
                "`evaluate_sequences=null`)",
            )
        return self

    @property
    def frozen_model(self) -> ModelInput | None:
        """The frozen model that runs next to the trained one; None if there is none."""
        return None

    def total_steps(self, sequence_length: int, blocks: int) -> int:
        """The number of optimiser steps in the whole stage.

        Args:
            sequence_length: tokens per block.
            blocks: training blocks in the store; only used for `epochs`.
        """
        return -(-self.total_sequences(sequence_length, blocks) // self.batch_sequences)

    def total_sequences(self, sequence_length: int, blocks: int) -> int:
        """The number of sequences in the whole stage; the last step may have fewer than `batch_sequences`."""
        if self.steps is not None:
            return self.steps * self.batch_sequences
        if self.tokens is not None:
            return self.tokens // sequence_length
        assert self.epochs is not None
        return round(self.epochs * blocks)

    def micro_batch_on(self, ranks: int) -> int:
        """Sequences that each of `ranks` ranks processes at once; `batch_sequences` must be divisible by `ranks`.

        A run may continue on another number of ranks than it began with: its batch stays the same, but each rank's
        share of it changes.
        """
        share, rest = divmod(self.batch_sequences, ranks)
        assert share > 0 and rest == 0, "checked before the run"
        return max(size for size in range(1, min(self.micro_batch_sequences, share) + 1) if share % size == 0)

    def warmup(self, total_steps: int) -> int:
        """The number of steps of linear warm-up."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_fraction * total_steps)
