"""Make minima/assets/tasks/continuation_{en,zh}.jsonl: which sentence or verse comes next?

    python tools/make_continuation_task.py

The items are derived by rule from the embedded texts, so the answers need no judgement. They use only documents that
`build_data` holds out with its default seed and a `held_out_fraction` of at least 0.03, as in the quickstart: a model
trained on the rest has not seen them. The wrong choices come from the same documents, so that neither the century nor
familiarity from training gives the answer away. The same texts give the same items.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from minima.assets import read_text_asset
from minima.data.documents import HeldOut
from minima.recipe.schema import BuildData

TASKS = Path(__file__).resolve().parent.parent / "minima" / "assets" / "tasks"
ITEMS = 32  # per language
CHOICES = 4
HELD_OUT_FRACTION = 0.03
SEED = BuildData.model_fields["seed"].default
ENGLISH_CONTEXT, ENGLISH_CHOICE = (60, 180), (50, 130)  # characters: together under 120 tokens of a small vocabulary
SENTENCE = re.compile(r"[A-Z][^.!?\n]*[.!?](?=\s)")


class Pair(NamedTuple):
    """Two consecutive pieces of a text.

    Attributes:
        id: of the document, and the place in it.
        first: the context.
        second: the true continuation.
    """

    id: str
    first: str
    second: str


def held_out(name: str) -> Iterator[dict[str, str]]:
    """Records of an embedded text that are held out from training."""
    records = list(read_text_asset(name))
    kept = HeldOut(HELD_OUT_FRACTION, SEED).mask([record["text"].encode("utf-8") for record in records])
    return (record for record, keep in zip(records, kept, strict=True) if keep)


def sentences() -> list[Pair]:
    """Consecutive sentences of the addresses, of suitable length and without figures, initials or abbreviations."""
    pairs = []
    for record in held_out("sotu"):
        found = list(SENTENCE.finditer(record["text"]))
        for index, (one, two) in enumerate(pairwise(found)):
            between = record["text"][one.end() : two.start()]
            first, second = one[0], two[0]
            fair = fits(first, ENGLISH_CONTEXT) and fits(second, ENGLISH_CHOICE) and between == " "
            if fair and not re.search(r"\d|\b[A-Z]\.|\b(Mr|Mrs|Dr|No|St)\.", first + second):
                pairs.append(Pair(f"{record['id']}.{index}", first, second))
    return pairs


def verses() -> list[Pair]:
    """The two halves of a couplet: `秦川雄帝宅，` and `函谷壯皇居。`, of five or seven characters each."""
    pairs = []
    for record in held_out("poems"):
        for index, line in enumerate(record["text"].splitlines()[1:]):
            halves = re.fullmatch(r"([一-鿿]{5}|[一-鿿]{7})，([一-鿿]{5}|[一-鿿]{7})。", line)
            if halves and len(halves[1]) == len(halves[2]):
                pairs.append(Pair(f"{record['id']}.{index}", halves[1] + "，", halves[2] + "。"))
    return pairs


def fits(text: str, bounds: tuple[int, int]) -> bool:
    """Whether a text's length is within the bounds."""
    return bounds[0] <= len(text) <= bounds[1]


def document(pair: Pair) -> str:
    """The id of the document that a pair is from."""
    return pair.id.rpartition(".")[0]


def items(pairs: list[Pair], far: int) -> list[dict[str, object]]:
    """Questions in an order determined by the ids: the true continuation among others of similar length.

    Args:
        pairs: all pairs in the texts.
        far: wrong choices are taken from pairs of the same document that are more than this many places away, or from
            other documents if there are not enough of them.
    """
    made: list[dict[str, object]] = []
    for pair in spread(pairs)[:ITEMS]:
        draw = random.Random(f"{SEED} {pair.id}")
        same = [other for other in pairs if document(other) == document(pair) and abs(place(other) - place(pair)) > far]
        others = same if len(same) > 20 else [other for other in pairs if document(other) != document(pair)]
        draw.shuffle(others)
        near = sorted(others, key=lambda other: abs(len(other.second) - len(pair.second)))[: 2 * CHOICES]
        wrong = [other.second for other in draw.sample(near, CHOICES - 1)]
        answer = len(made) % CHOICES  # each position equally often
        choices = [*wrong[:answer], pair.second, *wrong[answer:]]
        made.append({"id": pair.id, "context": pair.first, "choices": choices, "answer": answer})
    return made


def spread(pairs: list[Pair]) -> list[Pair]:
    """All pairs in a fixed pseudo-random order, the first of every document before the second of any."""
    order = sorted(pairs, key=lambda pair: hashlib.sha256(pair.id.encode()).hexdigest())
    seen: Counter[str] = Counter()
    turns = []
    for pair in order:
        turns.append((seen[document(pair)], pair))
        seen[document(pair)] += 1
    return [pair for _, pair in sorted(turns, key=lambda turn: turn[0])]


def place(pair: Pair) -> int:
    """The place of a pair in its document."""
    return int(pair.id.rpartition(".")[2])


def main() -> None:
    """Write both files."""
    for language, pairs, far in (("en", sentences(), 3), ("zh", verses(), 0)):
        made = items(pairs, far)
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in made]
        (TASKS / f"continuation_{language}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{language}: {len(made)} items from {len({document(pair) for pair in pairs})} documents")


if __name__ == "__main__":
    main()
