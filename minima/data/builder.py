"""The build of a data set: sources in; a tokenizer, training blocks, held-out blocks and a report out."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minima.data.block_packing import PackedWriter
from minima.data.build_report import build_report, check_enough, show_rejected, unigram_entropy
from minima.data.chats.conversations import read_conversations
from minima.data.chats.encoding import ChatEncoder
from minima.data.chats.template_choice import set_template
from minima.data.chats.templates import template_of
from minima.data.documents import HeldOut
from minima.data.encoding import Encoded, Encoder, EncodingPool, EncodingTask, Result
from minima.data.mixture import SourceStream, mix, source_labels, training_texts
from minima.data.packing import StoreWriter
from minima.data.parts.files import folder_sha256
from minima.data.parts.merging import RecordedParts
from minima.data.piece_training import train_sentencepiece
from minima.data.sources import read_source
from minima.data.store import TokenStore
from minima.data.tokenizer import ends_added, is_lone, load_tokenizer, save_tokenizer, write_tokenizer
from minima.disk import write_json
from minima.disk_errors import disk_full_named
from minima.errors import DataError
from minima.recipe.data import TokenizerTraining
from minima.recipe.schema import BuildData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("minima.data")
_LOG_EVERY_SECONDS = 5.0
_ADD_TOKENS = 1 << 16


def build(
    stage: BuildData,
    folder: Path,
    tokenizer: str | Path | TokenizerTraining,
    parts: RecordedParts | None = None,
    *,
    evaluated: bool = False,
) -> dict[str, Any]:
    """Write `tokenizer/`, `train/`, `held_out/` and `report.json` into a folder.

    The result depends on the stage and its sources, not on the number of processes. Everything is written under
    temporary names and renamed at the end; a failure before that leaves nothing behind.

    Args:
        folder: must exist; an earlier result in it is replaced.
        tokenizer: the folder or Hub id of a tokenizer, or how to train one.
        parts: take documents already encoded from these parts instead; the result is byte-identical.
        evaluated: whether a stage will evaluate on the held-out text.

    Returns:
        The report's numbers, without the examples of rejected records.

    Raises:
        DataError: a source is missing, empty or unreadable, or there is too little text.
        DiskFull: there is no space left.
    """
    started = time.monotonic()
    unfinished = folder / "tokenizer.partial"
    try:
        with disk_full_named(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            plan = make_tokenizer(stage, tokenizer, unfinished)
        if parts is not None:
            rule = HeldOut(stage.held_out_fraction, stage.seed)
            parts.prepare(folder_sha256(unfinished), plan.read, plan.make, rule)
        report = _encode(stage, folder, plan, parts, evaluated)
        earlier_seconds = parts.seconds if parts is not None else 0.0
        report["seconds"] = round(earlier_seconds + time.monotonic() - started, 3)
        with disk_full_named(folder):
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            os.replace(unfinished, folder / "tokenizer")
            write_json(folder / "report.json", report)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    metrics = {name: value for name, value in report.items() if name != "sources"}
    metrics["sources"] = {
        name: {key: value for key, value in numbers.items() if key != "rejected"} | numbers["rejected"]["counts"]
        for name, numbers in report["sources"].items()
    }
    return metrics


class Plan(NamedTuple):
    """How documents become tokens."""

    end_token: int
    vocabulary_size: int
    make: Callable[[], Callable[[EncodingTask], Result]]  # makes an encoder
    read: Callable[..., Iterator[str]] = read_source
    writer: type[StoreWriter] | type[PackedWriter] = StoreWriter
    begin_token: int | None = None  # put before each document of text


def processes_of(stage: BuildData) -> int:
    """The number of encoding processes."""
    return stage.processes or len(os.sched_getaffinity(0))


def make_tokenizer(stage: BuildData, tokenizer: str | Path | TokenizerTraining, folder: Path) -> Plan:
    """Write the tokenizer, and return how documents are encoded with it."""
    if isinstance(tokenizer, TokenizerTraining):
        logger.info("training a tokenizer of %d pieces", tokenizer.vocabulary_size)
        model = train_sentencepiece(_tokenizer_texts(stage, tokenizer), tokenizer.vocabulary_size)
        write_tokenizer(model, folder)
        return Plan(2, tokenizer.vocabulary_size, partial(Encoder, folder, 2, tokenizer.vocabulary_size))
    if Path(tokenizer).expanduser().is_dir():
        tokenizer = Path(tokenizer).expanduser()
    loaded = load_tokenizer(tokenizer)
    end_token: int = loaded.eos_token_id
    size = max(len(loaded), end_token + 1)
    if stage.format == "text":
        save_tokenizer(loaded, tokenizer, folder)
        begin = _begin_token(stage, loaded, tokenizer)
        return Plan(end_token, size, partial(Encoder, folder, end_token, size, begin), begin_token=begin)
    set_template(loaded, stage.chat_template)
    save_tokenizer(loaded, tokenizer, folder)
    pairs = stage.format == "preferences"
    make = partial(ChatEncoder, folder, template_of(loaded), size, stage.sequence_length, pairs)
    return Plan(end_token, size, make, partial(read_conversations, pairs=pairs), PackedWriter)


def _begin_token(stage: BuildData, tokenizer: "PreTrainedTokenizerBase", source: str | Path) -> int | None:
    """The id that each document begins with, or None. `source` is where the tokenizer was loaded from.

    A model that was trained with a begin token depends on it: attention that has nothing relevant to attend to goes
    there (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023).
    """
    adds, _ = ends_added(tokenizer)
    begin: int | None = tokenizer.bos_token_id
    if stage.add_bos_token and begin is None:
        raise DataError(
            f"build_data stage {stage.name!r} sets add_bos_token, but its tokenizer {stage.tokenizer} has no begin "
            "token",
            "the setting would have no effect",
            "omit add_bos_token",
        )
    token, asked = tokenizer.bos_token, stage.add_bos_token
    if asked is not None and asked != adds:
        how, other = ("with", "without") if asked else ("without", "with")
        logger.warning(
            "documents begin %s %r, but the tokenizer itself, and so the exported model, begins texts %s it",
            how,
            token,
            other,
        )
    elif adds:
        logger.info("documents begin with %r, as the tokenizer begins a text", token)
    elif asked is None and begin is not None and is_lone(source):
        logger.warning(
            "documents begin without %r: a tokenizer.model alone does not say whether texts begin with it; set "
            "add_bos_token: true if the model was trained with it, as Llama and Mistral were",
            token,
        )
    return begin if (adds if asked is None else asked) else None


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
            f"the tokenizer is to be trained on {', '.join(sorted(unknown))}, but no source has this label",
            "it would be trained on text other than what the recipe says",
            f"choose from {', '.join(source.label for source in stage.sources)}",
        )
    return training_texts(chosen, HeldOut(stage.held_out_fraction, stage.seed), training.max_characters)


def _encode(stage: BuildData, folder: Path, plan: Plan, parts: RecordedParts | None, evaluated: bool) -> dict[str, Any]:
    """Write and publish both stores; return the report without the time."""
    length = stage.sequence_length
    shape: dict[str, Any] = {
        "sequence_length": length, "vocabulary_size": plan.vocabulary_size, "end_token": plan.end_token,
        "shard_tokens": stage.shard_tokens, "format": stage.format, "document_mask": stage.document_mask,
    }  # fmt: skip
    budget = None if stage.tokens is None else stage.tokens // length
    held_out_budget = None if stage.held_out_tokens is None else stage.held_out_tokens // length
    labels = source_labels(stage.sources)
    aside_rule = HeldOut(stage.held_out_fraction, stage.seed)
    with (
        parts or EncodingPool(plan.make, processes_of(stage)) as pool,
        plan.writer(folder / "train", **shape, max_blocks=budget) as train,
        plan.writer(folder / "held_out", **shape, max_blocks=held_out_budget) as held_out,
    ):
        readers = [plan.read if parts is None else partial(parts.read, n) for n in range(len(stage.sources))]
        streams = [SourceStream(source, n, pool, aside_rule, readers[n]) for n, source in enumerate(stage.sources)]
        progress = _Progress()
        gathered = _Gathered(train, stage)
        for stream, documents, aside in mix(streams, endless=budget is not None):
            stream.held_out_documents += held_out.add(aside)
            gathered.add(documents)
            progress.show(train.tokens, streams)
            if train.full:
                break
        gathered.flush()
        written, set_aside = train.finish(), held_out.finish()
        check_enough(stage, written, set_aside, sum(s.held_out_documents for s in streams), evaluated)
        train.publish()
        held_out.publish()
    for label, stream in zip(labels, streams, strict=True):
        show_rejected(label, stream.rejected)
        if (stream.epochs or 1.0) >= 1.05:
            logger.info("source %s: its documents were read %.1f times to fill its share", label, stream.epochs)
    logger.info("wrote %d training and %d held-out blocks", written["blocks"], set_aside["blocks"])
    unigram = unigram_entropy(TokenStore.open(folder / "held_out"))
    return build_report(stage.format, streams, labels, written, set_aside, train.beyond_tokens) | {
        "unigram_entropy": unigram, "sequence_length": length, "vocabulary_size": plan.vocabulary_size,
        "begin_token": plan.begin_token,
    }  # fmt: skip


class _Gathered:
    """Passes documents on to a writer in larger pieces, because adding each turn of a mixture by itself is slow.

    The result is the same. Conversations, which their writer buffers itself, and the last documents before the store is
    full are passed on at once.
    """

    def __init__(self, writer: StoreWriter | PackedWriter, stage: BuildData) -> None:
        self._writer, self._at_once = writer, stage.format != "text"
        self._limit_tokens = sys.maxsize if stage.tokens is None else stage.tokens - stage.sequence_length
        self._waiting: list[Encoded] = []
        self._tokens = 0

    def add(self, documents: Encoded) -> None:
        tokens = len(documents.ids)
        if self._at_once or self._writer.tokens + self._tokens + tokens >= self._limit_tokens:
            self.flush()
            self._writer.add(documents)
            return
        self._waiting.append(documents)
        self._tokens += tokens
        if self._tokens >= _ADD_TOKENS:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._writer.add(Encoded.joined(self._waiting))
        self._waiting, self._tokens = [], 0


class _Progress:
    """Logs a line every few seconds."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def show(self, tokens: int, streams: list[SourceStream]) -> None:
        now = time.monotonic()
        if now - self._last < _LOG_EVERY_SECONDS:
            return
        self._last = now
        rate = sum(stream.bytes for stream in streams) / (now - self._started) / 1e6
        documents = sum(stream.documents for stream in streams)
        logger.info("%.1f M tokens, %d documents, %.1f MB of text per second", tokens / 1e6, documents, rate)
