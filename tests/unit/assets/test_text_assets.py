"""The embedded texts: all there, whole, small enough, with their licences."""

from importlib import resources

import pytest

from minima.assets import TEXTS, read_text_asset


@pytest.mark.parametrize(
    ("name", "documents", "least_bytes"), [("sotu", 233, 10_500_000), ("poems", 12_362, 2_500_000)]
)
def test_texts_are_whole(name, documents, least_bytes):
    records = list(read_text_asset(name))
    assert len(records) == documents
    assert len({record["id"] for record in records}) == documents
    assert all(record["text"].strip() for record in records)
    assert sum(len(record["text"].encode()) for record in records) > least_bytes


def test_known_lines():
    sotu = {record["id"]: record["text"] for record in read_text_asset("sotu")}
    assert sotu["1790_george_washington_n"].startswith("Fellow-Citizens of the Senate")
    first = next(read_text_asset("poems"))
    assert first["author"] == "太宗皇帝"
    assert first["text"].startswith("帝京篇十首 一\n秦川雄帝宅，函谷壯皇居。\n")


def test_at_most_five_megabytes_with_sources_and_licences():
    folder = resources.files("minima.assets") / "texts"
    sizes = {file.name: len(file.read_bytes()) for file in folder.iterdir()}
    assert sum(sizes[f"{name}.jsonl.xz"] for name in TEXTS) < 5_000_000
    sources = (folder / "SOURCES.md").read_text(encoding="utf-8")
    for name in TEXTS:
        assert f"{name}.jsonl.xz" in sources
        assert sizes[f"LICENSE-{name}.txt"] > 500
