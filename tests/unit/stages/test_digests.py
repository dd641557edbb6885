"""What counts of a file, a model folder and a source of text."""

import threading

import pytest

from minima.recipe.data import Source
from minima.stages import digests
from minima.stages.digests import digest, file_digest, folder_digest, is_gone, source_digest


def test_the_order_of_keys_does_not_count():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1}) != digest({"a": 1})


def test_a_large_file_counts_by_its_ends_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_EDGE_BYTES", 4)
    monkeypatch.setattr(digests, "_SAMPLES", 0)
    path, seen = tmp_path / "f", set()
    for content in (b"abcd....wxyz", b"Abcd....wxyz", b"abcd....wxyZ", b"abcd...wxyz", b"abc", b"abcdwxyz", b"abcdwx"):
        path.write_bytes(content)
        seen.add(file_digest(path))
    assert len(seen) == 7


def test_samples_of_its_inside_count(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_EDGE_BYTES", 4)
    monkeypatch.setattr(digests, "_SAMPLES", 4)
    monkeypatch.setattr(digests, "_SAMPLE_BYTES", 2)
    path = tmp_path / "f"

    def changed(at):
        content = bytearray(b"abcd" + b"." * 40 + b"wxyz")
        content[at] = ord("!")
        path.write_bytes(bytes(content))
        return file_digest(path)

    path.write_bytes(b"abcd" + b"." * 40 + b"wxyz")
    before = file_digest(path)
    assert file_digest(path) == before
    assert {at for at in range(48) if changed(at) != before} == {
        0, 1, 2, 3, 4, 5, 14, 15, 24, 25, 34, 35, 44, 45, 46, 47,
    }  # fmt: skip


def test_the_inside_of_a_model_file_counts(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(4 << 20))
    before = folder_digest(tmp_path)
    with open(path, "r+b") as file:  # the same size, the same ends
        file.seek(3 << 19)
        file.write(b"1" * (1 << 20))
    assert folder_digest(tmp_path) != before


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "train/index.json", "held_out/index.json", "tokenizer/tokenizer.json", "model/config.json",
        "model/model.safetensors", "checkpoints/step-00000012/checkpoint.json",
    ],
)  # fmt: skip
def test_what_is_read_of_a_copied_stage_counts(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    without = folder_digest(tmp_path)
    path.write_bytes(b"one")
    before = folder_digest(tmp_path)
    path.write_bytes(b"two")
    assert len({without, before, folder_digest(tmp_path)}) == 3
    path.write_bytes(b"one")
    assert folder_digest(tmp_path) == before


def test_the_same_file_elsewhere_in_a_folder_is_another_input(tmp_path):
    for place in ("a/model", "b/tokenizer"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
    assert folder_digest(tmp_path / "a") != folder_digest(tmp_path / "b")


def test_what_is_not_read_of_a_copied_stage_does_not_count(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2):
        (checkpoints / f"step-0000000{step}").mkdir(parents=True)
        (checkpoints / f"step-0000000{step}" / "checkpoint.json").write_text(str(step))
    before = folder_digest(tmp_path)
    (checkpoints / "step-00000001" / "checkpoint.json").write_text("another")
    (checkpoints / "step-00000003.partial").mkdir()
    (checkpoints / "step-00000003.partial" / "checkpoint.json").touch()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0").touch()
    assert folder_digest(tmp_path) == before


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("key", ["path", "hub"])
def test_a_folder_of_text_counts_by_its_files(tmp_path, monkeypatch, key, home):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    source = Source(**{key: "~/set" if home else str(tmp_path / "set")})
    (folder / "a.arrow").write_bytes(b"one")
    before = source_digest(source)
    (folder / ".lock").touch()
    assert source_digest(source) == before
    (folder / "a.arrow").write_bytes(b"two")
    assert source_digest(source) != before


def test_files_below_two_stars_count(tmp_path):
    (tmp_path / "deeper").mkdir()
    file = tmp_path / "deeper" / "a.txt"
    file.write_text("one")
    source = Source(path=f"{tmp_path}/**")
    before = source_digest(source)
    file.write_text("two")
    assert source_digest(source) != before
    assert not is_gone(source)


def test_a_hidden_file_is_no_text_of_a_pattern(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source = Source(path=f"{tmp_path}/*")
    before = source_digest(source)
    (tmp_path / ".a.txt.swp").write_text("an editor's")
    assert source_digest(source) == before
    (tmp_path / "a.txt").unlink()
    assert is_gone(source), "what is left is not read"


def test_a_hub_dataset_counts_by_what_the_recipe_says():
    one, other = (Source(hub="org/set", revision=revision) for revision in ("a", "b"))
    assert source_digest(one) != source_digest(other)


def test_files_are_read_several_at_once_and_count_in_order(tmp_path, monkeypatch):
    """Ten thousand files of a corpus, one after the other, took minutes before anything began."""
    for number in range(8):
        (tmp_path / f"{number}.jsonl").write_text(str(number))
    one_by_one = digests.digest([(path.name, file_digest(path)) for path in sorted(tmp_path.iterdir())])
    together = threading.Barrier(8, timeout=20)

    def waits_for_the_others(path):
        together.wait()
        return file_digest(path)

    monkeypatch.setattr(digests, "file_digest", waits_for_the_others)
    assert source_digest(Source(path=str(tmp_path))) == one_by_one
