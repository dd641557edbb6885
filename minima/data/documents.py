"""Documents before tokenization: rejected records, the held-out split, shuffling and batches."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T", bound=Sized)  # a text, or a placeholder of the same length
_EXAMPLES = 3  # shown for each reason
_EXCERPT_CHARACTERS = 80
# The shuffle buffer: a source that fits is permuted as a whole, a larger one is shuffled within a window. At two bytes
# per character for most scripts this is at most 128 MB; the sampler shuffles blocks anyway.
SHUFFLE_CHARACTERS = 1 << 26
# One task for a worker: about 60,000 tokens, or tens of milliseconds, so that the cost of starting it is negligible.
BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 2048


class Rejected:
    """Records that gave no document, counted by reason, with the first few of each kept as examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def add(self, reason: str, where: str, content: object) -> None:
        """Count one record.

        Args:
            reason: `broken_json`, `not_a_record`, `missing_field`, `not_text`, `empty`, `not_utf8`, `unknown_suffix`;
                for chats also `not_a_conversation`, `not_a_pair`, `unknown_role`, `roles_out_of_order`,
                `empty_user_turn`, `empty_assistant_turn`, `no_answer`, `equal_answers`, `prompts_differ`,
                `unknown_prompt`, `forged_marker`, `too_long`, `refused_by_template`, `not_splittable`,
                `weight_between_0_and_1`, `nothing_to_learn`.
            where: file and line, or source and row.
            content: of the record; an excerpt of it is kept.
        """
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append({"where": where, "excerpt": _content_text(content)[:_EXCERPT_CHARACTERS]})

    def describe(self) -> str:
        """All counts and first examples in one sentence."""
        if not self.counts:
            return "no record was found"
        return "; ".join(
            f"{count} x {reason}, first at {self.examples[reason][0]['where']}: {self.examples[reason][0]['excerpt']!r}"
            for reason, count in sorted(self.counts.items())
        )

    def report(self) -> dict[str, Any]:
        """Counts and examples, for the stage's report."""
        return {"counts": dict(sorted(self.counts.items())), "examples": dict(sorted(self.examples.items()))}


def shortened(content: object) -> str:
    """Shorten rejected content so that `Rejected.add` still keeps the same excerpt as of the whole."""
    text = _content_text(content)
    return text if len(text) <= _EXCERPT_CHARACTERS else f"{text[:_EXCERPT_CHARACTERS]}..."  # ends in no white space


def _content_text(content: object) -> str:
    if isinstance(content, bytes):
        content = content[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    return printable(content if isinstance(content, str) else repr(content)).strip()


def printable(text: str) -> str:
    """The text with lone surrogates escaped, so that it can be written anywhere."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class HeldOut(NamedTuple):
    """The rule for held-out documents: a hash of their text, so that equal texts always get the same decision."""

    fraction: float  # expected share of documents
    seed: int  # key of the hash (blake2b); another seed holds out other documents

    def mask(self, contents: list[bytes]) -> np.ndarray:
        """Whether each text (in UTF-8) is held out, as a bool array."""
        if not self.fraction:
            return np.zeros(len(contents), dtype=bool)
        key, limit = (self.seed % 2**64).to_bytes(8, "little"), round(self.fraction * 2.0**64)
        digests = (hashlib.blake2b(content, digest_size=8, key=key).digest() for content in contents)
        return np.array([int.from_bytes(digest, "little") < limit for digest in digests], dtype=bool)


def shuffled(texts: Iterable[T], seed: str, window_characters: int = SHUFFLE_CHARACTERS) -> Iterator[T]:
    """Texts in a seeded random order.

    Args:
        window_characters: size of the buffer to draw from. If all texts fit, the order is a uniformly random
            permutation; otherwise a text can be drawn earlier than its place by at most the window.
    """
    order, held = random.Random(seed), 0
    waiting: list[T] = []
    for text in texts:
        waiting.append(text)
        held += len(text)
        while held > window_characters and len(waiting) > 1:
            drawn = order.randrange(len(waiting))
            waiting[drawn], waiting[-1] = waiting[-1], waiting[drawn]
            held -= len(waiting[-1])
            yield waiting.pop()
    order.shuffle(waiting)
    waiting.reverse()
    while waiting:
        yield waiting.pop()


def batched(texts: Iterable[T]) -> Iterator[list[T]]:
    """Consecutive texts in lists of about `BATCH_CHARACTERS`; divided by content alone, independent of timing."""
    batch: list[T] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
