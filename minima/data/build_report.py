"""The report of a build: its numbers, what was left out, and whether there is enough data."""

import logging
from collections import Counter
from typing import Any

import numpy as np

from minima.data.documents import Rejected
from minima.data.mixture import SourceStream
from minima.data.store import TokenStore
from minima.errors import DataError
from minima.recipe.schema import BuildData

logger = logging.getLogger("minima.data")
_ENTROPY_TOKENS = 1 << 24  # read at once, in eight bytes each


def build_report(
    format: str,
    streams: list[SourceStream],
    labels: list[str],
    written: dict[str, Any],
    set_aside: dict[str, Any],
    beyond_tokens: int,
) -> dict[str, Any]:
    """The content of the report, without the time and the stage's settings.

    Args:
        written: the counts that the training store's writer returned.
        set_aside: the same for the held-out store.
    """
    bytes_, characters = sum(s.bytes for s in streams), sum(s.characters for s in streams)
    tokens, learnt_tokens = sum(s.tokens for s in streams), sum(s.learnt_tokens for s in streams)
    rejected = dict(sum((s.rejected.counts for s in streams), Counter[str]()))
    chat = _chat_report(format, streams, written, set_aside) if format != "text" else {}
    return chat | {
        "documents": written["documents"],
        "tokens": written["tokens"],
        "blocks": written["blocks"],
        "bytes": written["bytes"],
        "dropped_tail_tokens": written["dropped_tokens"],
        "tokens_beyond_budget": beyond_tokens,
        "held_out_documents": set_aside["documents"],
        "held_out_tokens": set_aside["tokens"],
        "held_out_blocks": set_aside["blocks"],
        "held_out_bytes": set_aside["bytes"],
        "held_out_dropped_tail_tokens": set_aside["dropped_tokens"],
        "rejected": rejected,
        "tokens_per_character": tokens / characters,
        "bytes_per_token": bytes_ / learnt_tokens,
        "sources": {
            label: {
                "documents": s.documents,
                "tokens": s.tokens,
                "bytes": s.bytes,
                "share": s.tokens / tokens,
                "epochs": s.epochs,
                "held_out_documents": s.held_out_documents,
                "rejected": s.rejected.report(),
            }
            for label, s in zip(labels, streams, strict=True)
        },
    }


def _chat_report(
    format: str, streams: list[SourceStream], written: dict[str, Any], set_aside: dict[str, Any]
) -> dict[str, Any]:
    """The part of the report that only conversations and pairs have."""
    units = "pairs" if format == "preferences" else format
    return {
        units: written["units"],
        "learnt_tokens": written["learnt_tokens"],
        "padding_tokens": written["padding_tokens"],
        "padding_share": written["padding_tokens"] / written["tokens"],
        "cut_conversations": sum(s.cut for s in streams),
        "unanswered_turns": sum(s.unanswered for s in streams),
        f"held_out_{units}": set_aside["units"],
        "held_out_learnt_tokens": set_aside["learnt_tokens"],
        "held_out_padding_tokens": set_aside["padding_tokens"],
    }


def show_rejected(label: str, rejected: Rejected) -> None:
    """Warn about a source's rejected records; a few in a large source are no reason to stop."""
    for reason, count in sorted(rejected.counts.items()):
        examples = [f"{example['where']}: {example['excerpt']!r}" for example in rejected.examples[reason]]
        records = f"{count} {'record' if count == 1 else 'records'}"
        logger.warning("source %s: left out %s, %s\n  %s", label, records, reason, "\n  ".join(examples))


def check_enough(
    stage: BuildData, written: dict[str, Any], set_aside: dict[str, Any], held_out_documents: int, evaluated: bool
) -> None:
    """Refuse a store without blocks; an empty held-out store is only a warning if nobody asked for one.

    Args:
        written: counts of the training store.
        set_aside: counts of the held-out store.
        evaluated: whether a stage of the run evaluates on held-out text.

    Raises:
        DataError: there is not enough text; the message says how much there was.
    """
    if not written["blocks"]:
        raise DataError(
            f"the text has {written['dropped_tokens']} training tokens, less than one block of {stage.sequence_length}",
            "there is nothing to train on",
            "give more text or a shorter `sequence_length`",
        )
    if stage.held_out_fraction and not set_aside["blocks"]:
        documents = written["documents"] + held_out_documents
        few = "; whole documents are held out, and a plain text file is one document: split it into lines of jsonl"
        what = (
            f"held_out_fraction {stage.held_out_fraction} chose {held_out_documents} of {documents} documents, with "
            f"{set_aside['dropped_tokens']} tokens, less than one block of {stage.sequence_length}"
        )
        do = "raise `held_out_fraction` (or `held_out_tokens`), or set held_out_fraction to 0 for no held-out data"
        do += few if documents * stage.held_out_fraction < 1 else ""
        if not evaluated and not {"held_out_fraction", "held_out_tokens"} & stage.model_fields_set:
            logger.warning("%s: %s, so no stage can evaluate on this data; to change that, %s", stage.name, what, do)
            return
        raise DataError(what, "there is nothing to evaluate on", do)


def unigram_entropy(store: TokenStore) -> float | None:
    """Entropy of a store's token distribution, in nats per token: the best loss of a model without context.

    Returns:
        The entropy over trainable tokens; None for an empty store.
    """
    if not len(store):
        return None
    counts = np.zeros(store.vocabulary_size, dtype=np.int64)
    at_once = max(1, _ENTROPY_TOKENS // store.sequence_length)
    for begin in range(0, len(store), at_once):
        numbers = np.arange(begin, min(len(store), begin + at_once))
        tokens, learnt = store.blocks(numbers), store.learnt(numbers)
        tokens = tokens.reshape(-1) if learnt is None else tokens[learnt]
        counts += np.bincount(tokens, minlength=store.vocabulary_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
