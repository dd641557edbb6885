"""Measures the speed of build_data against the tokenizer's own batch encoding of the same text on the same cores.

    python tools/bench_data.py [--megabytes 100] [--processes N] [--repeats 3] [--text sotu|poems] [--tokenizer FOLDER]

Both are timed alternately in one run. The build reads JSON lines, encodes, packs, checksums and writes, including the
start of its workers; the tokenizer's batch encoding (its own threads, `encode_batch_fast`) has the text in memory.
Besides wall-clock time it reports CPU seconds: on a machine with other load, only those are comparable.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from minima.assets import TEXTS, read_text_asset

BATCH_DOCUMENTS = 256


def main() -> None:
    """Time both and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0, help="text, in millions of UTF-8 bytes")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text", choices=TEXTS, default="sotu")
    parser.add_argument("--vocabulary-size", type=int, default=None, help="default: 2048, or 8192 for the poems")
    parser.add_argument("--tokenizer", default=None, help="a folder with tokenizer.json, instead of training one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        _bench(options, Path(scratch))


def _bench(options: argparse.Namespace, scratch: Path) -> None:
    # imported here, because each worker process imports this file again
    from transformers import AutoTokenizer

    from minima.data.builder import build
    from minima.data.piece_training import train_sentencepiece
    from minima.data.store import TokenStore
    from minima.data.tokenizer import write_tokenizer
    from minima.recipe.data import Source
    from minima.recipe.schema import BuildData

    texts = [record["text"] for record in read_text_asset(options.text)]
    tokenizer = Path(options.tokenizer or scratch / "tokenizer")
    if options.tokenizer is None:
        size = options.vocabulary_size or {"sotu": 2048, "poems": 8192}[options.text]
        write_tokenizer(train_sentencepiece(texts, size), tokenizer)
    documents: list[str] = []
    size_bytes = 0
    while size_bytes < options.megabytes * 1e6:
        text = texts[len(documents) % len(texts)]
        documents.append(text)
        size_bytes += len(text.encode("utf-8"))
    corpus = scratch / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    stage = BuildData(
        name="bench", kind="build_data", sources=[Source(path=str(corpus))], tokenizer=str(tokenizer),
        sequence_length=2048, held_out_fraction=0.0, processes=options.processes,
    )  # fmt: skip
    AutoTokenizer.from_pretrained(str(tokenizer))  # keeps transformers' one-time start-up out of the measured rate
    megabytes = size_bytes / 1e6
    own, built = [], []
    for _ in range(options.repeats):
        own.append(_Timing.of(lambda: _encode(tokenizer, documents)))
        built.append(_Timing.of(lambda: build(stage, scratch, str(tokenizer))))
        sys.stdout.write(f"batch encoding: {own[-1].show(megabytes)}   build_data: {built[-1].show(megabytes)}\n")
        sys.stdout.flush()
    tokens = TokenStore.open(scratch / "train").tokens
    sys.stdout.write(
        f"{megabytes:.1f} MB, {len(documents)} documents, {tokens / 1e6:.1f} M tokens, "
        f"{len(os.sched_getaffinity(0))} cores, {options.processes} processes; medians of {options.repeats}:\n"
    )
    for clock in ("wall", "processor"):
        rates = [megabytes / statistics.median(getattr(timing, clock) for timing in group) for group in (own, built)]
        sys.stdout.write(
            f"by {clock} seconds: batch encoding {rates[0]:.2f} MB/s, build_data {rates[1]:.2f} MB/s, "
            f"ratio {rates[1] / rates[0]:.3f}\n"
        )


class _Timing(NamedTuple):
    wall: float
    processor: float  # CPU seconds of this process, its threads and its finished children

    @classmethod
    def of(cls, work: Callable[[], object]) -> Self:
        wall, before = time.monotonic(), os.times()
        work()
        return cls(time.monotonic() - wall, sum(os.times()[:4]) - sum(before[:4]))

    def show(self, megabytes: float) -> str:
        return f"{megabytes / self.wall:6.2f} MB/s, {self.processor:6.2f} processor s"


def _encode(folder: Path, documents: list[str]) -> int:
    """The tokenizer's own batch encoding of texts to lists of ids on all cores; returns the number of ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    count = 0
    for begin in range(0, len(documents), BATCH_DOCUMENTS):
        encodings = tokenizer.encode_batch_fast(documents[begin : begin + BATCH_DOCUMENTS], add_special_tokens=False)
        count += sum(len(ids) for ids in [encoding.ids for encoding in encodings])
    return count


if __name__ == "__main__":
    main()
