"""Every reader, every reason to reject a record, every missing source."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from minima.data import sources
from minima.data.documents import HeldOut, Rejected
from minima.data.mixture import read_shuffled, training_texts
from minima.data.sources import read_source
from minima.errors import DataError
from minima.recipe.data import Source

TEXTS = ["one", "zwei\nlines", "三 🙂", "four"]
MANY = [f"{number:09d}" for number in range(300)]


def read(**source):
    rejected = Rejected()
    return list(read_source(Source(**source), rejected)), rejected


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def in_frames(content: bytes) -> bytes:
    """As `pzstd` and appending write it."""
    return zstd(content[:40]) + zstd(content[40:])


def test_text_files_one_document_each_in_sorted_order(tmp_path):
    for name, text in zip(("b.txt", "a.md", "c/d.text", "c/.hidden.txt"), TEXTS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8-sig" if name == "b.txt" else "utf-8")
    texts, rejected = read(path=str(tmp_path))
    assert texts == [TEXTS[1], TEXTS[0], TEXTS[2]]
    assert not rejected.counts
    assert read(path=str(tmp_path / "?.*"))[0] == [TEXTS[1], TEXTS[0]]
    assert read(path=str(tmp_path / "b.txt"), format="text")[0] == [TEXTS[0]]


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress),
                                              (".bz2", bz2.compress), (".zst", zstd), (".zst", in_frames)])  # fmt: skip
def test_json_lines(tmp_path, suffix, pack):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines(TEXTS, "body") + b"\n\n"))
    texts, rejected = read(path=str(tmp_path), field="body")
    assert texts == TEXTS
    assert not rejected.counts


def test_parquet(tmp_path):
    table = pyarrow.table({"id": [1, 2, 3, 4, 5], "text": [*TEXTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    texts, rejected = read(path=str(tmp_path / "a.parquet"))
    assert texts == TEXTS
    assert rejected.counts == {"not_text": 1}
    assert rejected.examples["not_text"][0]["where"].endswith("a.parquet:5")


def test_few_large_parquet_rows_are_read_at_once(tmp_path, monkeypatch):
    """A thousand books would take gigabytes."""
    books = [f"book {number} " * 5000 for number in range(40)]
    parquet.write_table(pyarrow.table({"text": books}), tmp_path / "a.parquet", use_dictionary=False)
    monkeypatch.setattr(sources, "_PARQUET_BYTES", 200_000)
    sizes, whole = [], parquet.ParquetFile.iter_batches

    def watched(*args, **settings):
        for batch in whole(*args, **settings):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", watched)
    assert read(path=str(tmp_path / "a.parquet"))[0] == books
    assert max(sizes) <= 5


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "dictionary", "files"])
def test_datasets(tmp_path, streaming, kind):
    dataset = datasets.Dataset.from_dict({"id": list(range(4)), "text": TEXTS})
    folder = tmp_path / "set"
    if kind == "saved":
        dataset.save_to_disk(str(folder))
    elif kind == "dictionary":
        datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder))
    else:
        folder.mkdir()
        (folder / "train.jsonl").write_bytes(lines(TEXTS))
    assert read(hub=str(folder), streaming=streaming)[0] == TEXTS
    assert read(hub=str(folder), streaming=streaming, max_documents=2)[0] == TEXTS[:2]
    with pytest.raises(DataError, match=r"no column 'body'|missing_field"):
        read(hub=str(folder), streaming=streaming, field="body")


def test_a_saved_dictionary_names_its_splits(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": dataset, "validation": dataset}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match="no split 'test' but train, validation"):
        read(hub=str(tmp_path / "set"), split="test")


def test_home_folders_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("text", "set"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(lines(TEXTS))
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    for path in ("~/text", "~/text/a.jsonl", "~/text/*.jsonl"):
        assert read(path=path)[0] == TEXTS
    for folder in ("~/set", "~/saved"):
        assert read(hub=folder)[0] == TEXTS


def test_embedded():
    assert len(read(embedded="sotu")[0]) == 233


def test_rejected_records_are_counted_and_shown(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [b'{"text": "cut', b'["list"]', b'{"body": "x"}', b'{"text": 7}', b'{"text": null}', b'{"text": " "}',
           b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100_000]  # fmt: skip
    path.write_bytes(b"\n".join([lines(["good"]).strip(), *bad, lines(["also good"]).strip()]))
    texts, rejected = read(path=str(path))
    assert texts == ["good", "also good"]
    assert rejected.counts == {
        "broken_json": 2, "not_a_record": 1, "missing_field": 1, "not_text": 2, "empty": 1, "not_utf8": 2,
    }  # fmt: skip
    assert rejected.examples["broken_json"][0] == {"where": f"{path}:2", "excerpt": '{"text": "cut'}
    assert rejected.examples["not_utf8"][1]["where"] == f"{path}:9"
    json.dumps(rejected.report(), ensure_ascii=False).encode("utf-8")


def test_only_the_first_few_are_shown(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 50 + lines(["good"]))
    _, rejected = read(path=str(tmp_path))
    assert rejected.counts["missing_field"] == 50
    assert [example["where"][-2:] for example in rejected.examples["missing_field"]] == [":1", ":2", ":3"]


def test_a_file_that_is_not_utf8_and_one_of_unknown_kind(tmp_path):
    (tmp_path / "a.txt").write_bytes("Bücher".encode("latin-1"))
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.exe").write_bytes(b"MZ")
    texts, rejected = read(path=str(tmp_path))
    assert texts == ["good"]
    assert rejected.counts == {"not_utf8": 1, "unknown_suffix": 1}


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"", "no document: no record was found"),
        ("a.jsonl", b'{"body": "x"}\n' * 3, "3 x missing_field, first at .*a.jsonl:1"),
        ("a.parquet", b"PAR1 but cut", "not a complete parquet file"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:10] + b"\xff" * 40, "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.xz", b"not xz", "cannot be read"),
        ("a.jsonl.xz", lzma.compress(b"{}\n" * 99)[:40] + b"\xff" * 40, "cannot be read"),
        ("a.jsonl.bz2", bz2.compress(b"{}\n" * 99)[:12] + b"\xff" * 40, "cannot be read"),
        ("a.jsonl.zst", b"not zstd", "cannot be read"),
        ("a.jsonl.zst", zstd(b"{}\n" * 99)[:-9], "cannot be read"),
        ("a.jsonl.zst", zstd(lines(TEXTS))[:20] + b"\xff" * 40, "cannot be read"),
        ("a.exe", b"MZ", "known suffix"),
    ],
)
def test_sources_that_give_nothing_are_refused(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        read(path=str(tmp_path / name))
    assert caught.value.why
    assert caught.value.do


def test_missing_sources_are_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path / "*.txt", tmp_path):
        with pytest.raises(DataError, match="no file at"):
            read(path=str(path))
    with pytest.raises(DataError, match="cannot be opened"):
        read(hub=str(tmp_path / "none"))
    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'; it has body"):
        read(path=str(tmp_path / "a.parquet"))


def test_a_folder_that_datasets_saved_is_named_with_the_way_to_read_it(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "many"))
    for name in ("one", "many"):
        with pytest.raises(DataError, match="written by `save_to_disk` of datasets") as refused:
            read(path=str(tmp_path / name))
        assert f"hub: {tmp_path / name}" in refused.value.do


def test_a_dataset_card_is_no_document(tmp_path):
    (tmp_path / "README.md").write_text("a card")
    assert read(path=str(tmp_path))[0] == ["a card"], "of a folder of texts it is one of them"
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "README.md").write_text("a text")
    (tmp_path / "train.jsonl").write_bytes(lines(TEXTS))
    assert read(path=str(tmp_path))[0] == ["a text", *TEXTS]


# -- several sources ---------------------------------------------------------------------------------------------


def test_an_order_depends_on_the_seed_the_sources_place_and_the_pass(tmp_path):
    """Else the n-th documents of two translations, say, would always come together."""
    (tmp_path / "a.jsonl").write_bytes(lines(MANY))
    source = Source(path=str(tmp_path))
    orders = [list(read_shuffled(source, *key, Rejected(), 0)) for key in ((0, 776), (0, 776), (1, 776), (0, 777))]
    orders.append(list(read_shuffled(source, 0, 776, Rejected(), 1)))
    assert all(sorted(order) == MANY for order in orders) and orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 4


def test_a_tokenizer_is_trained_on_sources_by_their_weights(tmp_path):
    sources = []
    for number, (letter, weight) in enumerate((("a", 3.0), ("b", 1.0))):
        (tmp_path / f"{letter}.jsonl").write_bytes(lines([letter + text for text in MANY]))
        sources.append((number, Source(path=str(tmp_path / f"{letter}.jsonl"), weight=weight)))
    texts = list(training_texts(sources, HeldOut(0.0, 776), 2000))
    assert [sum(text[0] == letter for text in texts) for letter in "ab"] == [150, 50]
