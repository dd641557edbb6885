"""Extract instruction data and preference pairs from the package `llamafactory`, for recipes/smollm2-chat.yaml.

There are 999 English and 1,000 Chinese records in the Alpaca style, and 300 preference pairs in each language. The
package is Apache-2.0; the texts were written by other language models, and the set that the records come from is
CC BY-NC 4.0: use it for experiments on your machine, not for release.

    python tools/fetch_chat_data.py                    # -> runs/data/chat
    python tools/fetch_chat_data.py --archive llamafactory-0.9.5.tar.gz
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llamafactory==0.9.5"  # the source archive, because the wheel has no data
ARCHIVE_SHA256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
FILES = {"alpaca_en": 999, "alpaca_zh": 1000, "dpo_en": 300, "dpo_zh": 300}


def download(folder: Path) -> Path:
    """Download the package's source archive with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("llamafactory-*.tar.gz"))


def check(archive: Path) -> None:
    """Exit unless the archive is the one that this script was written for."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != ARCHIVE_SHA256:
        raise SystemExit(f"{archive} has sha256 {found}, but {ARCHIVE_SHA256} was expected: download it again")


def extract(archive: Path, folder: Path) -> None:
    """Write each set as JSON lines, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        for name, count in FILES.items():
            file = packed.extractfile(f"llamafactory-0.9.5/data/{name}_demo.json")
            assert file is not None, name
            records = json.load(file)
            assert len(records) == count, (name, len(records))
            partial = folder / f".{name}.jsonl.partial"
            partial.write_text(
                "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
            )
            partial.rename(folder / f"{name}.jsonl")
            print(f"{folder / name}.jsonl: {count} records")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/data/chat"))
    parser.add_argument("--archive", type=Path, help="a source archive that is already on this machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        archive = options.archive or download(Path(temporary))
        check(archive)
        extract(archive, options.folder)


if __name__ == "__main__":
    main()
