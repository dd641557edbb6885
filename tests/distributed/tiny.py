"""A tiny teacher and student, and a feed of uneven random text, the same on any number of ranks."""

import torch
from torch import Tensor

from minima.batch import Batch, make_batch
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource
from minima.recipe.training import Training

VOCABULARY, LENGTH, BATCH = 61, 12, 8
CPU = torch.device("cpu")
STUDENT = ModelShape(
    vocabulary_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_key_value_heads=2,
    max_positions=32, tied=True,
)  # fmt: skip
TEACHER = ModelShape(
    vocabulary_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4, max_positions=32
)


def config_of(shape: ModelShape) -> dict:
    """A stock config whose random weights are large enough for losses that differ."""
    return shape.to_config() | {"initializer_range": 0.2}


def student_source() -> RandomSource:
    return RandomSource(config_of(STUDENT), seed=1)


def teacher_source() -> RandomSource:
    return RandomSource(config_of(TEACHER), seed=2)


def training(**changes) -> Training:
    """Settings of a short run: clipping bites, weights decay, the rate is high."""
    settings = {
        "batch_sequences": BATCH, "micro_batch_sequences": 2, "steps": 6, "learning_rate": 5e-3, "warmup_steps": 2,
        "gradient_clip": 0.5, "precision": "float32", "log_every_steps": 1, "activation_checkpointing": "none",
    }  # fmt: skip
    return Training(**(settings | changes))


def step_tokens(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and validity of a step's global batch: rows of very different length, one of them empty."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens_BT = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 3, 7, 0, LENGTH, 2, 9, 5])[torch.randperm(BATCH, generator=generator)]
    return tokens_BT, torch.arange(LENGTH)[None] < lengths[:, None]


def step_documents(step: int) -> Tensor:
    """Documents of a step's global batch: rows of one, two and three, cut at other places each step."""
    generator = torch.Generator().manual_seed(2000 + step)
    begins_BT = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    for row in range(BATCH):
        begins_BT[row, torch.randperm(LENGTH - 1, generator=generator)[: row % 3] + 1] = 1
    return begins_BT.cumsum(1)


class TinyFeed:
    """The same global batches, cut for one rank into micro-batches."""

    def __init__(
        self, micro_batch: int, rank: int = 0, world_size: int = 1, device: torch.device = CPU, packed: bool = False
    ) -> None:
        self.micro_batch, self.rank, self.share = micro_batch, rank, BATCH // world_size
        self.device, self.packed = device, packed

    def step(self, step: int) -> list[Batch]:
        tokens_BT, valid_BT = step_tokens(step)
        documents_BT = step_documents(step)
        first, batches = self.rank * self.share, []
        for start in range(first, first + self.share, self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            batch = make_batch(tokens_BT[rows], valid_BT[rows], documents_BT[rows] if self.packed else None)
            samples = tuple(step * BATCH + row for row in range(start, start + self.micro_batch))
            batches.append(batch._replace(samples=samples).to(self.device))
        return batches
