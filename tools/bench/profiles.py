"""The shapes, rows and repetitions of each profile. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from minima.models.shape import ModelShape
from minima.recipe.distillation import Offload, Placement

# The original's 7B teacher with its expanded vocabulary, and the student it was pruned to.
LLAMA_7B = ModelShape(
    vocabulary_size=49216, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, max_positions=4096
)
MINIMA_3B = ModelShape(
    vocabulary_size=49216, hidden_size=3072, intermediate_size=8192, num_layers=24, num_heads=24, max_positions=4096
)


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        group: `a`, only the loss differs; `b`, each tool as shipped; `window`, the effect of the teacher window;
            `loss`, the loss alone.
        what: the loss in groups `a` and `loss`, the tool in group `b`, `minima` in group `window`.
        precision: of weights and activations.
        micro_batch: sequences that one rank runs at once; 0 for the largest that fits, found by trying.
        micro_batches: micro-batches per optimiser step and rank.
        placement: placement of minima's teacher.
        offload: where its shards are stored.
        window: micro-batches per traversal of its layers.
        turns: number of fresh process groups in which it is timed.
    """

    group: str
    what: str
    precision: str = "float32"
    micro_batch: int = 4
    micro_batches: int = 1
    placement: Placement = "zero3"
    offload: Offload = "none"
    window: int = 1
    turns: int = 2

    @property
    def name(self) -> str:
        """Its name in the result, unique within a profile."""
        parts = [f"{self.group}:{self.what}"]
        if self.group == "window":
            parts += [self.placement if self.offload == "none" else self.offload, f"window {self.window}"]
        return " ".join([*parts, *([self.precision] if self.precision != "float32" else [])])


@dataclass(frozen=True)
class Profile:
    """Shapes, rows and repetitions.

    Attributes:
        name: on the command line.
        device: `cpu` or `cuda`.
        ranks: number of processes in the training process group.
        sequence_tokens: tokens per sequence.
        loss_tokens: tokens for the loss alone.
        steps: timed optimiser steps per turn.
        loss_repeats: timed passes of the loss alone per turn.
        activation_checkpointing: of every row's student.
        kernels: for minima's own rows in group `b`, and for group `window`.
        ceiling_width: rows and columns of the matmul that measures the ceiling; the copy that measures memory bandwidth
            has 64 times its square in bytes.
        micro_batches_to_try: sequences that a row with `micro_batch` 0 tries, smallest first.
        memory_bytes: limit for group `b` on a GPU that has more memory; its micro-batches are the largest that fit.
        sharing_groups: groups whose rows share a process group in each turn, because starting takes longer than timing.
        shared_process: run all rows in one process group, in one turn: a quick check of the program, no measurement.
    """

    name: str
    device: str
    ranks: int
    teacher: ModelShape
    student: ModelShape
    sequence_tokens: int
    loss_tokens: int
    rows: tuple[Row, ...] = field(repr=False)
    steps: int = 2
    loss_repeats: int = 3
    activation_checkpointing: str = "none"
    kernels: str = "stock"
    ceiling_width: int = 2048
    micro_batches_to_try: tuple[int, ...] = ()
    memory_bytes: int | None = None
    sharing_groups: tuple[str, ...] = ()
    shared_process: bool = False

    def flops_per_token(self) -> float:
        """Model FLOPs per token: the teacher's forward, the student's forward and backward, without recomputation."""
        return self.teacher.forward_flops_per_token(self.sequence_tokens) + self.student.training_flops_per_token(
            self.sequence_tokens
        )


LOSSES = ("minima", "dense", "trl", "trl_chunked", "liger")
TOOLS = ("original", "trl", "liger")


# Placements where a window saves traffic: between ranks, within a machine, from host memory, from disk.
PLACES: tuple[tuple[Placement, Offload], ...] = (
    ("zero3", "none"), ("zero3_node", "none"), ("zero3", "cpu"), ("zero3", "nvme"),
)  # fmt: skip


def _windows(window: int, places: Sequence[tuple[Placement, Offload]], **fields) -> tuple[Row, ...]:
    """Rows with and without a window, for each placement."""
    plain = Row("window", "minima", micro_batches=window, **fields)
    rows = (replace(plain, placement=placement, offload=offload) for placement, offload in places)
    return tuple(one for row in rows for one in (row, replace(row, window=window)))


def _rows(precision: str, micro_batch: int, largest: int, **fields) -> tuple[Row, ...]:
    """The rows of groups a and b, and of the loss alone.

    Args:
        precision: of all rows.
        micro_batch: of group a.
        largest: micro-batch of group b; 0 to find it by trying.
    """
    a = [Row("a", what, precision, micro_batch, **fields) for what in LOSSES]
    # If all rows have the same micro-batch, minima's row in group b would repeat that of group a.
    tools = TOOLS if largest == micro_batch else ("minima", *TOOLS)
    b = [Row("b", what, precision, largest, **fields) for what in tools]
    # The tools come last: their process groups take most of the time, and a stopped run keeps what it has.
    return (*a, *(Row("loss", what, precision, turns=fields.get("turns", 2)) for what in LOSSES), *b)


def _more_turns(turns: int, rows: tuple[Row, ...], names: tuple[str, ...]) -> tuple[Row, ...]:
    """The same rows with more turns for those whose ratio is the headline."""
    return tuple(replace(row, turns=turns) if row.name in names else row for row in rows)


_CPU = Profile(
    name="cpu",
    device="cpu",
    ranks=2,
    teacher=ModelShape(
        vocabulary_size=32000, hidden_size=512, intermediate_size=1376, num_layers=8, num_heads=8, max_positions=1024
    ),
    student=ModelShape(
        vocabulary_size=32000, hidden_size=384, intermediate_size=1024, num_layers=4, num_heads=6, max_positions=1024
    ),
    sequence_tokens=1024,
    loss_tokens=4096,
    loss_repeats=2,
    rows=(
        *_more_turns(3, _rows("float32", 4, 4), ("a:minima", "b:original")),
        Row("b", "minima_compiled", turns=2),
        Row("b", "minima_stock", turns=2),
        Row("loss", "minima_stock", turns=2),
        Row("b", "original_recomputing", turns=1),
        Row("a", "minima", "bfloat16", turns=1),
        Row("b", "original", "bfloat16", turns=1),
        *_windows(4, PLACES, micro_batch=1, turns=1),
    ),
)

# Most of the same rows, in seconds; used by the tests.
_TINY_SHAPE = ModelShape(
    vocabulary_size=256, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, max_positions=32
)
_TINY = replace(
    _CPU,
    name="tiny",
    teacher=_TINY_SHAPE,
    student=_TINY_SHAPE,
    sequence_tokens=32,
    loss_tokens=128,
    steps=1,
    loss_repeats=1,
    ceiling_width=128,
    activation_checkpointing="full",
    micro_batches_to_try=(1, 2),
    shared_process=True,
    rows=(
        *(row for row in _rows("float32", 2, 0, turns=1) if row.name not in ("a:trl", "a:trl_chunked")),
        *_windows(2, (PLACES[0], PLACES[2]), micro_batch=1, turns=1),
    ),
)

_GPU = Profile(
    name="gpu-7b-3b",
    device="cuda",
    ranks=1,
    teacher=LLAMA_7B,
    student=MINIMA_3B,
    sequence_tokens=4096,
    loss_tokens=8192,
    activation_checkpointing="full",
    kernels="liger",
    steps=4,
    loss_repeats=10,
    ceiling_width=8192,
    micro_batches_to_try=(1, 2, 3, 4, 6, 8),
    memory_bytes=80_000_000_000,
    sharing_groups=("a", "loss", "window"),
    rows=(
        *_rows("bfloat16", 2, 0, placement="replica"),
        Row("b", "minima_compiled", "bfloat16", 0, placement="replica"),
    ),
)

_GPU_SMALL = replace(
    _GPU,
    name="gpu-small",
    teacher=ModelShape(
        vocabulary_size=49216, hidden_size=2048, intermediate_size=5504, num_layers=16, num_heads=16, max_positions=4096
    ),
    student=ModelShape(
        vocabulary_size=49216, hidden_size=1024, intermediate_size=2752, num_layers=12, num_heads=8, max_positions=4096
    ),
    sequence_tokens=2048,
    activation_checkpointing="none",
    micro_batches_to_try=(1, 2, 4, 8, 16, 32),
    rows=(*_rows("bfloat16", 4, 0, placement="replica"), *_windows(8, PLACES[2:], micro_batch=1, precision="bfloat16")),
)

_GPU_OFFLOAD = replace(
    _GPU,
    name="gpu-7b-3b-offload",
    steps=2,
    rows=_windows(8, (PLACES[2],), micro_batch=2, precision="bfloat16"),
)

# As many layers as the real pair, but tiny ones: measures the overhead of Python, PyTorch and DeepSpeed per step, for
# which a GPU has to wait if it exceeds the GPU's own work.
_THIN = {
    "vocabulary_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_key_value_heads": 4,
    "head_size": 16,
}  # fmt: skip
_HOST = replace(
    _GPU,
    name="host",
    device="cpu",
    teacher=LLAMA_7B.model_copy(update=_THIN),
    student=MINIMA_3B.model_copy(update=_THIN),
    sequence_tokens=16,
    kernels="stock",
    steps=10,
    ceiling_width=256,
    memory_bytes=None,
    rows=tuple(
        Row("b", what, "bfloat16", 2, placement="replica")
        for what in ("minima", "minima_compiled", "original", "trl", "liger")
    ),
)

PROFILES = {profile.name: profile for profile in (_CPU, _HOST, _TINY, _GPU_SMALL, _GPU, _GPU_OFFLOAD)}
SHOWN = tuple(name for name in PROFILES if name != "tiny")
