"""One part of a divided build: reads and encodes its share of every source's records, which the merge then orders."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from minima.data import documents
from minima.data.builder import Plan, make_tokenizer, processes_of
from minima.data.documents import HeldOut
from minima.data.encoding import EncodingPool, Result
from minima.data.parts.files import (
    INDEX,
    Part,
    check_file,
    files_of,
    folder_sha256,
    read_index,
    write_index,
    write_piece,
)
from minima.data.parts.recording import Run, Waiting, encoded, runs
from minima.data.parts.share import Share
from minima.disk import sync
from minima.disk_errors import disk_full_named
from minima.errors import StoreCorrupted
from minima.recipe.data import TokenizerTraining
from minima.recipe.schema import BuildData

logger = logging.getLogger("minima.data")
_LOG_EVERY_SECONDS = 5.0
MARGIN = 1.05  # parts of a few hundred batches each differ by less than this


def is_recorded(folder: Path, identity: str) -> bool:
    """Whether the part in `folder` is finished, undamaged and made from this stage; if not, it has to be made again."""
    if not (folder / INDEX).is_file():
        return False
    try:
        index = read_index(folder)
        for file in files_of(index):
            check_file(folder, file, verify=True)
    except StoreCorrupted as error:
        logger.warning("%s: making it again", error.what)
        return False
    same: bool = index["identity"] == identity
    return same


def build_part(
    stage: BuildData, folder: Path, tokenizer: str | Path | TokenizerTraining, part: Part, identity: str
) -> dict[str, Any]:
    """Encode a part's share of every source.

    It is written under a temporary name, synced and renamed at the end; an interrupted part starts over. It holds about
    `parts.recording.PIECE_TOKENS` and the batches in flight in memory.

    Args:
        folder: of all parts; must exist.
        tokenizer: the folder or Hub id of a tokenizer, or how to train one. Each part trains it by itself: the same
            texts give the same tokenizer, and the merge compares them.

    Returns:
        `documents`, `tokens` and `seconds`.

    Raises:
        DataError: a source is missing or unreadable.
        DiskFull: there is no space left.
    """
    started = time.monotonic()
    final, unfinished = folder / part.name, folder / f"{part.name}.partial"
    with disk_full_named(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            plan = make_tokenizer(stage, tokenizer, unfinished / "tokenizer")
            found = _encode(stage, unfinished, plan, part)
            index = {
                "identity": identity,
                "part": list(part),
                "tokenizer": folder_sha256(unfinished / "tokenizer"),
                **found,
                "seconds": round(time.monotonic() - started, 3),
            }
            shutil.rmtree(unfinished / "tokenizer")
            write_index(unfinished, index)
            sync(unfinished)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(unfinished, final)
            sync(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    counts = {
        name: sum(piece[name] for pieces in found["sources"] for piece in pieces) for name in ("documents", "tokens")
    }
    return counts | {"seconds": index["seconds"]}


def _encode(stage: BuildData, folder: Path, plan: Plan, part: Part) -> dict[str, list[Any]]:
    """Write all pieces; return, by source, their index entries and the place at which reading stopped, if it did."""
    rule = HeldOut(stage.held_out_fraction, stage.seed)
    found: dict[str, list[Any]] = {"sources": [], "stopped": []}
    last, tokens = time.monotonic(), 0
    with EncodingPool(plan.make, processes_of(stage)) as pool:
        for number, source in enumerate(stage.sources):
            pieces: list[dict[str, Any]] = []
            waiting, limit, stopped, place = Waiting(), _Limit(stage, number, part), None, (0, 0)
            share = Share(*part, number, whole_files=stage.tokens is None)
            for run, result in encoded(runs(source, share, plan.read), pool, rule):
                if limit.reached and run.place != place:
                    stopped = place
                    break
                place = run.place
                waiting.add(run, result)
                limit.add(run, result)
                tokens += len(result.documents.ids)
                if waiting.full:
                    pieces.append(write_piece(folder, f"source-{number:02d}-{len(pieces):05d}", waiting.piece()))
                    waiting = Waiting()
                if time.monotonic() - last > _LOG_EVERY_SECONDS:
                    last = time.monotonic()
                    logger.info("part %s: %.1f M tokens, source %s", part, tokens / 1e6, source.label)
            if waiting.runs:
                pieces.append(write_piece(folder, f"source-{number:02d}-{len(pieces):05d}", waiting.piece()))
            found["sources"].append(pieces)
            found["stopped"].append(stopped)
    return found


class _Limit:
    """How much of a source a part must encode if `tokens` limits the build.

    That is the part's share of the most that the mixture can take from the source, and of what is read ahead for
    shuffling. A margin covers differences between the parts' documents; the merge encodes what is missing in the end.
    """

    def __init__(self, stage: BuildData, number: int, part: Part) -> None:
        self._tokens = self._characters = 0
        self._total = part.total
        self._needed: float | None = None
        if stage.tokens is not None:
            weights = [source.weight or 1.0 for source in stage.sources]
            weighted = any(source.weight is not None for source in stage.sources)
            share = weights[number] / sum(weights) if weighted else 1.0  # without weights it may have to supply it all
            self._needed = MARGIN * share * stage.tokens / (1 - stage.held_out_fraction)
        self._ahead = documents.SHUFFLE_CHARACTERS + (2 * processes_of(stage) + 3) * documents.BATCH_CHARACTERS

    def add(self, run: Run, result: Result) -> None:
        self._tokens += len(result.documents.ids)
        self._characters += sum(map(len, run.texts))

    @property
    def reached(self) -> bool:
        if self._needed is None or not self._characters:
            return False
        ahead = MARGIN * self._ahead * self._tokens / self._characters
        return self._tokens * self._total >= self._needed + ahead
