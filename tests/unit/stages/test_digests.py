"""What counts of a file, a model folder and a source of text."""

import pytest

from minima.recipe.data import Source
from minima.stages import digests
from minima.stages.digests import file_digest, folder_digest, source_digest


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


def test_a_hub_dataset_counts_by_what_the_recipe_says():
    one, other = (Source(hub="org/set", revision=revision) for revision in ("a", "b"))
    assert source_digest(one) != source_digest(other)
