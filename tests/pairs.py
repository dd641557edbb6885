"""A small store of random preference pairs, and the naive way to score them: each answer alone, dense, in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minima.batch import Batch
from minima.data.packing import StoreWriter
from minima.data.store import TokenStore
from minima.models.causal_lm import head_weight, hidden_states, load_plain
from minima.models.weights import WeightSource

LENGTH, VOCABULARY = 24, 61


class Answer(NamedTuple):
    """A conversation with its answer."""

    tokens: list[int]
    first: int  # of the answer's tokens, which are the last ones


def random_pairs(seed: int) -> list[tuple[Answer, Answer]]:
    """One to three pairs that fit into a block; their answers are short and of different lengths."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(1 + seed % 3):
        prompt = random.integers(1, VOCABULARY, random.integers(1, 3)).tolist()
        chosen, rejected = (random.integers(1, VOCABULARY, size).tolist() for size in random.permutation([1, 3]))
        pairs.append((Answer(prompt + chosen, len(prompt)), Answer(prompt + rejected, len(prompt))))
    return pairs


def write_pairs(folder: Path, num_blocks: int, seed: int = 0) -> TokenStore:
    """A store whose block `b` holds `random_pairs(seed + b)` and what fills it up."""
    shape = {"sequence_length": LENGTH, "vocabulary_size": VOCABULARY, "end_token": 0}
    with StoreWriter(folder, **shape, format="preferences", document_mask=True, shard_tokens=4 * LENGTH) as writer:
        for block in range(num_blocks):
            answers = [answer for pair in random_pairs(seed + block) for answer in pair]
            filling = Answer([0] * (LENGTH - sum(len(answer.tokens) for answer in answers)), LENGTH)
            documents = [answer for answer in [*answers, filling] if answer.tokens]
            writer.append(
                np.array([token for answer in documents for token in answer.tokens]),
                np.array([len(answer.tokens) for answer in documents]),
                np.array([4 * len(answer.tokens) for answer in documents]),
                np.array([place >= answer.first for answer in documents for place in range(len(answer.tokens))]),
                np.array([answer is filling for answer in documents]),
            )
        writer.finish()
        writer.publish()
    return TokenStore.open(folder)


def log_prob(model: torch.nn.Module, answer: Answer) -> Tensor:
    """Sum of log p over the answer's tokens, dense and alone, in the model's dtype."""
    tokens_T = torch.tensor(answer.tokens)
    log_probs_TV = model(tokens_T[None]).logits[0].log_softmax(-1)
    return log_probs_TV[answer.first - 1 : -1].gather(1, tokens_T[answer.first :, None]).sum()


def pair_losses(policy, reference, blocks: list[int], seed: int, *, beta: float, **kind) -> Iterator[Tensor]:
    """The loss of each pair of some blocks, pair by pair."""
    for block in blocks:
        for pair in random_pairs(seed + block):
            ratios = []
            for answer in pair:
                with torch.no_grad():
                    kept = log_prob(reference, answer)
                length = len(answer.tokens) - answer.first if kind.get("length_normalised") else 1
                ratios.append((log_prob(policy, answer) - kept) / length)
            h = ratios[0] - ratios[1]
            if kind.get("loss") == "ipo":
                yield (h - 1 / (2 * beta)) ** 2
            else:
                smoothing, p = kind.get("label_smoothing", 0.0), torch.sigmoid(beta * h)
                yield -(1 - smoothing) * p.log() - smoothing * (1 - p).log()


class PlainHost:
    """One stock model in this process, with a frozen host's face."""

    device = torch.device("cpu")

    def __init__(self, source: WeightSource) -> None:
        self.config = source.config
        self.model = load_plain(source)
        self.head_VE = head_weight(self.model).detach()
        self.calls = 0
        self.closed = False

    def hidden_states(self, batch: Batch) -> Tensor:
        self.calls += 1
        return hidden_states(self.model, batch)

    def close(self) -> None:
        self.closed = True
