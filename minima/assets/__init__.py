"""The texts that minima ships; their sources and licences are in `texts/SOURCES.md`."""

import json
import lzma
from collections.abc import Iterator
from importlib import resources

TEXTS = ("sotu", "poems")


def read_text_asset(name: str) -> Iterator[dict[str, str]]:
    """The records of an embedded text, in their order.

    Args:
        name: `sotu` (233 State of the Union addresses, English) or `poems` (12,362 Tang and Song poems, Chinese).

    Returns:
        Records with an `id` and a `text`; a poem also has an `author`.
    """
    assert name in TEXTS, name
    path = resources.files("minima.assets") / "texts" / f"{name}.jsonl.xz"
    with path.open("rb") as packed, lzma.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
