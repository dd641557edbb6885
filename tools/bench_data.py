"""How fast build_data is, beside the tokenizer's own batch encoding of the same text on the same cores.

    python tools/bench_data.py [--megabytes 100] [--processes N] [--repeats 3] [--text sotu|poems] [--tokenizer FOLDER]

Both are timed in turn, in one run. The build reads JSON lines, encodes, packs, checksums and writes, its workers'
start included; the tokenizer's batch encoding (its own threads, `encode_batch_fast`) has the text in memory.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from minima.assets import TEXTS, read_text_asset
from minima.data.builder import build
from minima.data.tokenizer import train_sentencepiece, write_tokenizer
from minima.recipe.data import Source
from minima.recipe.schema import BuildData

BATCH_DOCUMENTS = 256


def main() -> None:
    """Time both and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0, help="text, in millions of UTF-8 bytes")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text", choices=TEXTS, default="sotu")
    parser.add_argument("--vocabulary-size", type=int, default=None, help="default: 2048, or 8192 for the poems")
    parser.add_argument("--tokenizer", default=None, help="a folder with tokenizer.json instead of a new one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        _bench(options, Path(scratch))


def _bench(options: argparse.Namespace, scratch: Path) -> None:
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
    own: list[float] = []
    built: list[float] = []
    for _ in range(options.repeats):
        own.append(size_bytes / 1e6 / _time_own(tokenizer, documents))
        started = time.monotonic()
        metrics = build(stage, scratch, stage.tokenizer)
        built.append(size_bytes / 1e6 / (time.monotonic() - started))
        sys.stdout.write(f"batch encoding {own[-1]:6.2f} MB/s   build_data {built[-1]:6.2f} MB/s\n")
        sys.stdout.flush()
    tokens = metrics["tokens"] + metrics["dropped_tail_tokens"]
    ratio = statistics.median(built) / statistics.median(own)
    sys.stdout.write(
        f"{size_bytes / 1e6:.1f} MB, {len(documents)} documents, {tokens / 1e6:.1f} M tokens, "
        f"{len(os.sched_getaffinity(0))} cores, {options.processes} processes, medians of {options.repeats}:\n"
        f"batch encoding {statistics.median(own):.2f} MB/s, build_data {statistics.median(built):.2f} MB/s, "
        f"ratio {ratio:.3f}\n"
    )


def _time_own(folder: Path, documents: list[str]) -> float:
    """Seconds that the tokenizer's own batch encoding takes with all cores."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    started = time.monotonic()
    for begin in range(0, len(documents), BATCH_DOCUMENTS):
        tokenizer.encode_batch_fast(documents[begin : begin + BATCH_DOCUMENTS], add_special_tokens=False)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
