"""`minima stage --part I/N`: parts beside each other, their merge, and everything that is refused by name."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from minima import cli
from minima.assets import read_text_asset
from minima.errors import LauncherError, RecipeError
from minima.launcher import Launch
from minima.recipe.loading import load_recipe
from minima.stages import build_data, part
from minima.stages.lock import run_lock
from minima.stages.manifest import is_finished, read_manifest
from minima.stages.run_folder import claim_run_folder

RECIPE = """
name: divided
output: out
stages:
  - name: corpus
    kind: build_data
    sources:
      - {name: lines, path: lines.jsonl, weight: 2}
      - {embedded: sotu, max_documents: 3, weight: 1}
    tokenizer: {vocabulary_size: 500, max_characters: 200000}
    sequence_length: 64
    held_out_fraction: 0.05
    processes: 1
  - {name: other, kind: build_data, sources: [{embedded: poems}], tokenizer: corpus, sequence_length: 64}
"""


def write(folder):
    """The recipe, and lines enough for several blocks of records."""
    words = " ".join(record["text"] for record in itertools.islice(read_text_asset("sotu"), 20)).split()
    texts = [" ".join(words[12 * number : 12 * number + 12]) for number in range(4000)]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "r.yaml").write_text(RECIPE)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MINIMA_DRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(part, "_LOCK_SECONDS", 0.0)
    write(tmp_path)
    return tmp_path / "r.yaml"


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    """Files of the stage built in one go."""
    folder = tmp_path_factory.mktemp("undivided")
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert stage("r.yaml") == 0
    return contents(folder / "out" / "corpus")


def stage(*arguments):
    return cli.main(["stage", *map(str, arguments), "--stages", "corpus"])


def contents(folder):
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    report = json.loads(files.pop("report.json"))
    assert report.pop("seconds") > 0
    del files["manifest.json"], files["started.json"]
    return files, report


def test_parts_at_the_same_time_one_killed_then_merged(recipe, tmp_path, undivided, capsys):
    folder = tmp_path / "out" / "corpus"
    command = [sys.executable, "-m", "minima", "stage", "r.yaml", "--stages", "corpus", "--part"]
    parts = [subprocess.Popen([*command, f"{number}/3"], cwd=tmp_path) for number in range(3)]
    partial = folder / "parts" / "part-00001-of-00003.partial"
    until = time.monotonic() + 60
    while not partial.is_dir():
        assert time.monotonic() < until
        time.sleep(0.001)
    parts[1].kill()
    assert parts[1].wait() == -signal.SIGKILL
    assert [parts[0].wait(), parts[2].wait()] == [0, 0]
    assert partial.is_dir(), "it was killed in the middle"
    others = {file: file.stat().st_mtime_ns for file in (folder / "parts").glob("part-*-of-00003/*")}
    assert len({file.parent for file in others}) == 2
    assert not is_finished(folder)

    assert stage(recipe) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert "1 of 3 parts are missing" in said
    assert f"minima stage {recipe} --stages corpus --part 1/3" in said

    assert subprocess.run([*command, "1/3"], cwd=tmp_path, check=False).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in others} == others
    part_seconds = sum(
        json.loads(file.read_text())["content"]["seconds"] for file in (folder / "parts").glob("*/index.json")
    )
    assert stage(recipe) == 0
    assert not (folder / "parts").exists()
    assert contents(folder) == undivided
    manifest = read_manifest(folder)
    assert part_seconds < manifest["seconds"] < part_seconds + 60, "work, and no waiting"
    assert manifest["metrics"]["seconds"] > part_seconds


def test_a_finished_part_is_skipped_and_a_damaged_one_made_again(recipe, tmp_path, undivided, capsys):
    assert [stage(recipe, "--part", f"{number}/2") for number in (0, 1)] == [0, 0]
    capsys.readouterr()
    assert stage(recipe, "--part", "1/2") == 0
    assert "part 1/2 of stage corpus was already finished" in capsys.readouterr().out
    damaged = sorted((tmp_path / "out" / "corpus" / "parts" / "part-00001-of-00002").glob("*.tokens.npy"))[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert stage(recipe) == cli.USER_ERROR
    said = capsys.readouterr().err
    assert "StoreCorrupted" in said
    assert f"{damaged.name} has sha256" in said
    assert "--part 1/2" in said
    assert stage(recipe, "--part", "1/2") == 0
    assert "part 1/2 of stage corpus finished in" in capsys.readouterr().out
    assert stage(recipe) == 0
    assert contents(tmp_path / "out" / "corpus") == undivided
    assert stage(recipe, "--part", "0/2") == 0
    assert "stage corpus was already finished" in capsys.readouterr().out
    assert not (tmp_path / "out" / "corpus" / "parts").exists()


def test_parts_of_another_recipe_or_division_are_refused(recipe, tmp_path, capsys):
    assert stage(recipe, "--part", "0/2") == 0
    assert stage(recipe, "--part", "1/2", "stages.corpus.seed=5") == cli.USER_ERROR
    assert "seed is 5 and was 776" in capsys.readouterr().err
    assert stage(recipe, "stages.corpus.seed=5") == cli.USER_ERROR
    assert "seed is 5 and was 776" in capsys.readouterr().err
    assert stage(recipe, "--part", "1/3") == cli.USER_ERROR
    assert "several divisions: " in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "out" / "corpus" / "parts").iterdir())
    assert names == ["locks", "part-00000-of-00002"]


def test_no_two_of_the_same_part_and_none_beside_a_run(recipe, tmp_path, capsys):
    folder = tmp_path / "out" / "corpus"
    loaded = load_recipe(recipe)
    claim_run_folder(tmp_path / "out", loaded)
    with run_lock(build_data.lock_folder(folder, (0, 2))):
        assert stage(recipe, "--part", "0/2") == cli.USER_ERROR
        assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    with run_lock(tmp_path / "out"):
        assert stage(recipe, "--part", "0/2") == cli.USER_ERROR
        assert f"out is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not list(folder.glob("parts/part-*"))


def test_a_part_waits_for_others_that_look_at_the_folder(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(part, "_LOCK_SECONDS", 60.0)
    with ExitStack() as stack:
        stack.enter_context(run_lock(tmp_path / "out"))
        threading.Timer(0.5, stack.pop_all().close).start()
        assert cli.main(["stage", str(recipe), "--stages", "corpus", "--part", "0/2"]) == 0


@pytest.mark.parametrize("text", ["", "3", "a/b", "-1/2", "1/", "/2", "1/2/3", "1.0/2", "²/3"])
def test_what_is_no_part(text):
    with pytest.raises(RecipeError, match="is not I/N"):
        part.parse_part(text)


def test_numbers_count_from_nought():
    assert part.parse_part("0/1") == (0, 1)
    assert part.parse_part("15/16") == (15, 16)
    with pytest.raises(RecipeError, match="2 parts are numbered 0 to 1"):
        part.parse_part("2/2")
    with pytest.raises(RecipeError, match="0/0"):
        part.parse_part("0/0")


def test_one_build_data_stage_and_one_process(recipe, tmp_path):
    loaded = load_recipe(recipe)
    for names in (None, ["corpus", "other"]):
        with pytest.raises(RecipeError, match=r"corpus \(build_data\), other \(build_data\)"):
            part.run_part(loaded, recipe, names, "0/2", Launch(), print)
    with pytest.raises(LauncherError, match="2 ranks"):
        part.run_part(loaded, recipe, ["corpus"], "0/2", Launch(0, 2, 0, 2, "h", 1), print)
    assert not (tmp_path / "out").exists()
