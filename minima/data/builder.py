"""Sources -> tokenizer, training blocks, held-out blocks and a report."""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minima.data.documents import HeldOut, Rejected
from minima.data.encoding import EncodingPool
from minima.data.mixture import SourceStream, mix, source_labels, training_texts
from minima.data.packing import StoreWriter
from minima.data.store import TokenStore
from minima.data.tokenizer import load_tokenizer, save_tokenizer, train_sentencepiece, write_tokenizer
from minima.disk import disk_full_named
from minima.errors import DataError
from minima.recipe.data import TokenizerTraining
from minima.recipe.schema import BuildData

_LOG = logging.getLogger("minima.data")
_LOG_EVERY_SECONDS = 5.0
_ENTROPY_BLOCKS = 4096  # read at once


def build(stage: BuildData, folder: Path, tokenizer: str | Path | TokenizerTraining) -> dict[str, Any]:
    """Write `tokenizer/`, `train/`, `held_out/` and `report.json` into a folder.

    The result depends on the stage and its sources, not on the number of processes. All of it is written under
    temporary names and renamed at the end; when anything fails, nothing is left.

    Args:
        stage: what to build.
        folder: exists; an earlier result in it is replaced.
        tokenizer: the folder or Hub id of a tokenizer, or how to train one.

    Returns:
        The report's numbers, without the examples of rejected records.

    Raises:
        DataError: a source is missing, empty or unreadable, or there is too little text.
        DiskFull: no space left.
    """
    started = time.monotonic()
    partial = folder / "tokenizer.partial"
    try:
        with disk_full_named(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            end_token, vocabulary_size = _make_tokenizer(stage, tokenizer, partial)
        report = _encode(stage, folder, partial, end_token, vocabulary_size)
        report["seconds"] = round(time.monotonic() - started, 3)
        with disk_full_named(folder):
            _replace(partial, folder / "tokenizer")
            _write_json(folder / "report.json", report)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    metrics = {name: value for name, value in report.items() if name != "sources"}
    metrics["sources"] = {
        name: {key: value for key, value in numbers.items() if key != "rejected"} | numbers["rejected"]["counts"]
        for name, numbers in report["sources"].items()
    }
    return metrics


def _make_tokenizer(stage: BuildData, tokenizer: str | Path | TokenizerTraining, folder: Path) -> tuple[int, int]:
    """Write the tokenizer; its end token and its size."""
    if isinstance(tokenizer, TokenizerTraining):
        _LOG.info("training a tokenizer of %d pieces", tokenizer.vocabulary_size)
        model = train_sentencepiece(_tokenizer_texts(stage, tokenizer), tokenizer.vocabulary_size)
        write_tokenizer(model, folder)
        return 2, tokenizer.vocabulary_size
    if Path(tokenizer).expanduser().is_dir():
        tokenizer = Path(tokenizer).expanduser()
    loaded = load_tokenizer(tokenizer)
    save_tokenizer(loaded, tokenizer, folder)
    return loaded.eos_token_id, max(len(loaded), loaded.eos_token_id + 1)


def _tokenizer_texts(stage: BuildData, training: TokenizerTraining) -> Iterator[str]:
    """Training documents of the chosen sources, in proportion to their weights, up to `max_characters`."""
    chosen = [
        (number, source)
        for number, source in enumerate(stage.sources)
        if training.sources is None or source.label in training.sources
    ]
    unknown = set(training.sources or ()) - {source.label for source in stage.sources}
    if unknown:
        raise DataError(
            f"the tokenizer is to be trained on {', '.join(sorted(unknown))}, which no source is called",
            "it would be trained on other text than the recipe says",
            f"choose among {', '.join(source.label for source in stage.sources)}",
        )
    return training_texts(chosen, HeldOut(stage.held_out_fraction, stage.seed), training.max_characters)


def _encode(stage: BuildData, folder: Path, tokenizer: Path, end_token: int, vocabulary_size: int) -> dict[str, Any]:
    """Write and publish both stores; everything that the report says but the time."""
    length = stage.sequence_length
    shape = {"sequence_length": length, "vocabulary_size": vocabulary_size, "end_token": end_token}
    budget = None if stage.tokens is None else stage.tokens // length
    held_out_budget = None if stage.held_out_tokens is None else stage.held_out_tokens // length
    processes = stage.processes or len(os.sched_getaffinity(0))
    labels = source_labels(stage.sources)
    aside_rule = HeldOut(stage.held_out_fraction, stage.seed)
    with (
        EncodingPool(tokenizer, end_token, vocabulary_size, processes) as pool,
        StoreWriter(folder / "train", **shape, shard_tokens=stage.shard_tokens, max_blocks=budget) as train,
        StoreWriter(
            folder / "held_out", **shape, shard_tokens=stage.shard_tokens, max_blocks=held_out_budget
        ) as held_out,
    ):
        streams = [SourceStream(source, number, pool, aside_rule) for number, source in enumerate(stage.sources)]
        progress = _Progress()
        unused = 0  # tokens beyond the budget, of the last documents
        for documents, aside in mix(streams, endless=budget is not None):
            held_out.append(aside.ids, aside.lengths, aside.sizes)
            unused += len(documents.ids) - train.append(documents.ids, documents.lengths, documents.sizes)
            progress.show(train.tokens, streams)
            if train.full:
                break
        written, set_aside = train.finish(), held_out.finish()
        _check_enough(stage, written, set_aside, held_out_documents=sum(s.held_out_documents for s in streams))
        train.publish()
        held_out.publish()
    bytes_, characters = sum(s.bytes for s in streams), sum(s.characters for s in streams)
    tokens = sum(s.tokens for s in streams)
    rejected: dict[str, int] = {}
    for stream in streams:
        for reason, count in stream.rejected.counts.items():
            rejected[reason] = rejected.get(reason, 0) + count
    for label, stream in zip(labels, streams, strict=True):
        _show_rejected(label, stream.rejected)
    _LOG.info("wrote %d training and %d held-out blocks", written["blocks"], set_aside["blocks"])
    return {
        "documents": written["documents"],
        "tokens": written["tokens"],
        "blocks": written["blocks"],
        "bytes": written["bytes"],
        "dropped_tail_tokens": written["dropped_tokens"],
        "tokens_beyond_budget": unused,
        "held_out_documents": set_aside["documents"],
        "held_out_tokens": set_aside["tokens"],
        "held_out_blocks": set_aside["blocks"],
        "held_out_bytes": set_aside["bytes"],
        "held_out_dropped_tail_tokens": set_aside["dropped_tokens"],
        "rejected": rejected,
        "tokens_per_character": tokens / characters,
        "bytes_per_token": bytes_ / tokens,
        "unigram_entropy": unigram_entropy(TokenStore.open(folder / "held_out")),
        "sequence_length": length,
        "vocabulary_size": vocabulary_size,
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


def _show_rejected(label: str, rejected: Rejected) -> None:
    """Say what a source's records that gave no document were: a few in a large source are no reason to stop."""
    for reason, count in sorted(rejected.counts.items()):
        examples = [f"{example['where']}: {example['excerpt']!r}" for example in rejected.examples[reason]]
        records = f"{count} {'record' if count == 1 else 'records'}"
        _LOG.warning("source %s: left out %s, %s\n  %s", label, records, reason, "\n  ".join(examples))


def _check_enough(
    stage: BuildData, written: dict[str, Any], set_aside: dict[str, Any], held_out_documents: int
) -> None:
    if not written["blocks"]:
        raise DataError(
            f"the text has {written['dropped_tokens']} training tokens, less than one block of {stage.sequence_length}",
            "there would be nothing to train on",
            "give more text or a shorter `sequence_length`",
        )
    if stage.held_out_fraction and not set_aside["blocks"]:
        raise DataError(
            f"held_out_fraction {stage.held_out_fraction} chose {held_out_documents} documents with "
            f"{set_aside['dropped_tokens']} tokens, less than one block of {stage.sequence_length}",
            "there would be nothing to evaluate on",
            "raise `held_out_fraction` (or `held_out_tokens`), or set held_out_fraction to 0 to do without",
        )


def unigram_entropy(store: TokenStore) -> float | None:
    """Entropy of a store's own token distribution, in nats a token: what a model without context can reach at best.

    Returns:
        None for a store without blocks.
    """
    if not len(store):
        return None
    counts = np.zeros(store.vocabulary_size, dtype=np.int64)
    for begin in range(0, len(store), _ENTROPY_BLOCKS):
        blocks = store.blocks(np.arange(begin, min(len(store), begin + _ENTROPY_BLOCKS)))
        counts += np.bincount(blocks.reshape(-1), minlength=store.vocabulary_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


class _Progress:
    """A log line every few seconds."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def show(self, tokens: int, streams: list[SourceStream]) -> None:
        now = time.monotonic()
        if now - self._last < _LOG_EVERY_SECONDS:
            return
        self._last = now
        rate = sum(stream.bytes for stream in streams) / (now - self._started) / 1e6
        documents = sum(stream.documents for stream in streams)
        _LOG.info("%.1f M tokens, %d documents, %.1f MB of text a second", tokens / 1e6, documents, rate)


def _replace(partial: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
