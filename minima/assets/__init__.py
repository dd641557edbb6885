"""The texts, conversations and templates shipped with minima. `SOURCES.md` beside them gives sources and licences."""

import json
import lzma
from collections.abc import Iterator
from importlib import resources
from typing import Any

TEXTS = ("sotu", "poems")
CHATS = ("chat", "preferences")
TEMPLATES = ("minichat",)


def read_text_asset(name: str) -> Iterator[dict[str, str]]:
    """The records of an embedded text, in order.

    Args:
        name: `sotu` (233 State of the Union addresses, English) or `poems` (12,362 Tang and Song poems, Chinese).

    Returns:
        Records with an `id` and a `text`; a poem also has an `author`.
    """
    assert name in TEXTS, name
    return _read("texts", name)


def read_chat_asset(name: str) -> Iterator[dict[str, Any]]:
    """The embedded chat examples, in order.

    Args:
        name: `chat` for records with `messages`, or `preferences` for records with `prompt` (messages), `chosen` and
            `rejected`.
    """
    assert name in CHATS, name
    return _read("chat", name)


def read_template(name: str) -> str:
    """The text of an embedded chat template."""
    assert name in TEMPLATES, name
    return (resources.files("minima.assets") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _read(folder: str, name: str) -> Iterator[dict[str, Any]]:
    path = resources.files("minima.assets") / folder / f"{name}.jsonl.xz"
    with path.open("rb") as packed, lzma.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
