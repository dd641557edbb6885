"""A divided build, merged: the same bytes as the undivided one, whatever the sources, weights, passes and formats."""

import json
import os
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from minima.data.builder import build
from minima.data.documents import HeldOut, Rejected, shortened, shuffled
from minima.data.parts import building as part_building
from minima.data.parts import merging as part_merging
from minima.data.parts import recording as part_recording
from minima.data.parts import share
from minima.data.parts.building import build_part, is_recorded
from minima.data.parts.files import Part, read_index, read_piece
from minima.data.parts.merging import RecordedParts
from minima.data.parts.share import Share
from minima.data.sources import read_source
from minima.data.store import TokenStore
from minima.errors import DataError, StageError, StoreCorrupted
from minima.recipe.data import Source, TokenizerTraining

COMMAND = "minima stage r.yaml --stages corpus --part"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks, batches and pieces so small that a few documents fill several of each."""
    monkeypatch.setattr(share, "BLOCK_RECORDS", 8)
    monkeypatch.setattr("minima.data.documents.BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(part_recording, "PIECE_TOKENS", 3000)
    monkeypatch.setattr("minima.data.documents.SHUFFLE_CHARACTERS", 20_000)
    monkeypatch.setattr(shuffled, "__defaults__", (20_000,))  # the window: sources are larger than it


def encode(folder, stage, tokenizer, total, numbers=None):
    folder.mkdir(exist_ok=True)
    for number in range(total) if numbers is None else numbers:
        build_part(stage, folder, tokenizer, Part(number, total), "identity")


def opened(folder, stage, identity="identity"):
    return RecordedParts(folder, identity, COMMAND, stage.processes)


def contents(folder):
    """Every file of a build, with its bytes; the report without its time."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    report = json.loads(files.pop("report.json"))
    assert report.pop("seconds") > 0
    return files, report


def assert_same(tmp_path, stage, tokenizer, total):
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    whole.mkdir()
    merged.mkdir()
    build(stage, whole, tokenizer)
    encode(tmp_path / "parts", stage, tokenizer, total)
    build(stage, merged, tokenizer, opened(tmp_path / "parts", stage))
    (files, report), (again, report_again) = contents(whole), contents(merged)
    assert sorted(files) == sorted(again)
    assert {name for name in files if files[name] != again[name]} == set()
    assert report == report_again
    return report


@pytest.mark.parametrize("total", [1, 3, 7])
@pytest.mark.parametrize(
    ("weights", "tokens"), [((None, None), None), ((3.0, 1.0), None), ((3.0, 1.0), 150_000), ((None, None), 150_000)]
)
def test_the_merge_is_the_undivided_build(tmp_path, stage, jsonl, addresses, tokenizer, weights, tokens, total):
    sources = [
        {"name": name, "path": jsonl(texts), "weight": weight}
        for name, texts, weight in zip(("big", "small"), (addresses[:300], addresses[300:]), weights, strict=True)
    ]
    report = assert_same(tmp_path, stage(*sources, tokens=tokens, shard_tokens=4096), tokenizer, total)
    if tokens:
        assert report["sources"]["small"]["epochs"] > 1, "later passes are merged too"


def test_the_parts_documents_begin_as_the_undivided_builds(tmp_path, stage, jsonl, addresses, beginning):
    report = assert_same(tmp_path, stage({"path": jsonl(addresses[:200])}), beginning, 3)
    assert report["begin_token"] == 1


@pytest.mark.parametrize("weight", [None, 1.0])
@pytest.mark.parametrize("margin", [1.05, 0.3])
def test_parts_encode_what_the_mixture_takes_and_the_merge_what_is_short(
    tmp_path, stage, jsonl, addresses, tokenizer, monkeypatch, caplog, margin, weight
):
    monkeypatch.setattr(part_building, "MARGIN", margin)
    small, large = jsonl(addresses[:40]), tmp_path / "large"
    large.mkdir()
    for number in range(8):
        shutil.copy(jsonl(addresses[:250]), large / f"{number}.jsonl")
    sources = [{"path": small, "weight": weight}, {"name": "large", "path": str(large), "weight": weight}]
    chosen = stage(*sources, tokens=40_000)
    report = assert_same(tmp_path, chosen, tokenizer, 3)
    assert report["tokens"] == 40_000 // 32 * 32
    indices = [read_index(folder) for folder in (tmp_path / "parts").iterdir()]
    recorded = sum(piece["documents"] for index in indices for piece in index["sources"][1])
    assert recorded < (600 if weight else 1000), "of 2000"
    assert ("source large: part" in caplog.text) is (margin < 1)


def test_files_of_every_kind_and_what_they_reject(tmp_path, stage, jsonl, addresses, tokenizer):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        texts = [*addresses[40 * number : 40 * number + 40], "", 7, None, "\ud800"]
        texts = texts[20:] + texts[:20]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "\n{\n")
    (folder / "array.json").write_text(json.dumps([{"text": text} for text in [*addresses[200:230], ""]]))
    table = pyarrow.table({"text": [*addresses[230:290], None]})
    parquet.write_table(table, folder / "table.parquet", row_group_size=13)
    (folder / "page.txt").write_text(addresses[290])
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "broken.txt").write_bytes(b"\xff" * 200)
    few = {"name": "few", "path": jsonl([*addresses[291:300], " " * 90 + "\u00a0"])}
    at_most = {"name": "limited", "path": str(folder / "*.jsonl"), "max_documents": 57}
    every = {"name": "all", "path": str(folder)}
    poems = {"embedded": "poems", "max_documents": 30}
    report = assert_same(tmp_path, stage(every, few, at_most, poems), tokenizer, 4)
    reasons = report["sources"]["all"]["rejected"]["counts"]
    assert reasons == {"not_text": 11, "empty": 6, "not_utf8": 6, "broken_json": 5, "unknown_suffix": 1}
    assert report["sources"]["limited"]["documents"] + report["sources"]["limited"]["held_out_documents"] == 57


@pytest.mark.slow
@pytest.mark.parametrize(
    ("embedded", "length", "tokens"), [("chat", 72, 200_000), ("preferences", 128, None), ("preferences", 128, 100_000)]
)
def test_conversations_and_pairs(tmp_path, stage, byte_level, embedded, length, tokens):
    kind = "conversations" if embedded == "chat" else embedded
    chosen = stage({"embedded": embedded}, format=kind, sequence_length=length, tokens=tokens, seed=3)
    report = assert_same(tmp_path, chosen, byte_level, 3)
    assert report["rejected"]["too_long"] > 3, "what the encoder refuses is in the report as well"


def test_what_conversations_lose_is_counted_alike(tmp_path, stage, jsonl, byte_level):
    """Five that nobody answers, and three that are too long, of which one is both."""
    turns = [{"role": ("user", "assistant")[number % 2], "content": f"word {number}"} for number in range(60)]
    path = jsonl([turns[: 2 + number % 3 * 2] for number in range(40)] + [turns[:3]] * 4 + [turns] * 2 + [turns[:59]],
                 field="messages")  # fmt: skip
    chosen = stage({"path": path}, format="conversations", sequence_length=128, held_out_fraction=0.0)
    report = assert_same(tmp_path, chosen, byte_level, 3)
    assert (report["unanswered_turns"], report["cut_conversations"], report["conversations"]) == (5, 3, 47)


def test_a_tokenizer_that_is_trained_is_the_same_in_every_part(tmp_path, stage, jsonl, addresses):
    rule = TokenizerTraining(vocabulary_size=400, max_characters=50_000)
    chosen = stage({"path": jsonl(addresses)}, tokenizer=rule)
    assert_same(tmp_path, chosen, rule, 2)
    digests = {read_index(folder)["tokenizer"] for folder in (tmp_path / "parts").iterdir()}
    assert len(digests) == 1


def test_parts_of_another_tokenizer_are_refused(tmp_path, stage, jsonl, addresses, tokenizer):
    path = jsonl(addresses)
    encode(tmp_path / "parts", stage({"path": path}), tokenizer, 2, [0])
    rule = TokenizerTraining(vocabulary_size=400)
    encode(tmp_path / "parts", stage({"path": path}), rule, 2, [1])
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"part-00001-of-00002 was encoded with a different tokenizer.*\n.*\n.* 1/2"):
        build(stage({"path": path}), tmp_path / "out", tokenizer, opened(tmp_path / "parts", stage({"path": path})))
    assert not list((tmp_path / "out").iterdir())


def test_several_processes_give_the_same_part(tmp_path, stage, jsonl, addresses, tokenizer):
    path = jsonl(addresses)
    for processes in (1, 2):
        encode(tmp_path / str(processes), stage({"path": path}, processes=processes), tokenizer, 2, [1])
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.npy")} for name in ("1", "2"))
    assert one == two
    assert len(one) > 6


def test_documents_are_read_only_a_little_ahead_of_their_encoding():
    """Or a part would hold its whole share of a source in memory."""
    read = []

    def runs():
        for number in range(100):
            read.append(number)
            yield part_recording.Run((0, number), [str(number)], [])

    pool = SimpleNamespace(processes=2, submit=lambda task: task, result=lambda task: task.texts)
    for number, (run, texts) in enumerate(part_recording.encoded(runs(), pool, HeldOut(0.0, 0))):
        assert texts == run.texts == [str(number)]
        assert len(read) - number <= 2 * 2 + 2
    assert number == 99


def test_what_is_missing_is_named_with_its_command(tmp_path, stage, jsonl, addresses, tokenizer):
    chosen = stage({"path": jsonl(addresses)})
    encode(tmp_path / "parts", chosen, tokenizer, 4, [1, 3])
    with pytest.raises(DataError, match=rf"2 of 4 parts are missing in .*: 0/4, 2/4\n.*\n.*{COMMAND} 0/4"):
        opened(tmp_path / "parts", chosen)


def test_parts_of_another_stage_or_division_are_refused(tmp_path, stage, jsonl, addresses, tokenizer):
    chosen = stage({"path": jsonl(addresses)})
    encode(tmp_path / "parts", chosen, tokenizer, 2)
    with pytest.raises(StageError, match="part-00000-of-00002 was made from another recipe"):
        opened(tmp_path / "parts", chosen, "another")
    (tmp_path / "parts" / "part-00001-of-00002").rename(tmp_path / "parts" / "kept")
    (tmp_path / "parts" / "part-00000-of-00002").rename(tmp_path / "parts" / "part-00001-of-00002")
    (tmp_path / "parts" / "kept").rename(tmp_path / "parts" / "part-00000-of-00002")
    with pytest.raises(StageError, match="than its name says"):
        opened(tmp_path / "parts", chosen)
    encode(tmp_path / "parts", chosen, tokenizer, 3, [0])
    with pytest.raises(StageError, match=r"several divisions: .*of-00002, .*of-00003"):
        opened(tmp_path / "parts", chosen)
    with pytest.raises(StageError, match="the requested one, of 5"):
        part_merging.check_counts(tmp_path / "parts", 5)


def test_damage_is_found_and_named_and_mended_by_the_part(tmp_path, stage, jsonl, addresses, tokenizer):
    chosen = stage({"path": jsonl(addresses)})
    encode(tmp_path / "parts", chosen, tokenizer, 2)
    folder = tmp_path / "parts" / "part-00001-of-00002"
    (tmp_path / "out").mkdir()
    assert is_recorded(folder, "identity")
    assert not is_recorded(folder, "another")
    files = sorted(folder.iterdir())
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[-3] ^= 1
        for damaged in (bytes(flipped), content[:-2], None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert not is_recorded(folder, "identity")
            if damaged is None and file.name == "index.json":
                with pytest.raises(DataError, match="1 of 2 parts are missing"):
                    opened(tmp_path / "parts", chosen)
            elif not (file.name == "index.json" and damaged == content[:-2]):
                with pytest.raises(StoreCorrupted, match=rf"{file.name} .*\n.*\n.*--part 1/2"):
                    build(chosen, tmp_path / "out", tokenizer, opened(tmp_path / "parts", chosen))
                assert not list((tmp_path / "out").iterdir())
            file.write_bytes(content)
    files[0].write_bytes(b"")
    encode(tmp_path / "parts", chosen, tokenizer, 2, [1])
    build(chosen, tmp_path / "out", tokenizer, opened(tmp_path / "parts", chosen))


def test_a_part_that_fails_leaves_nothing_and_others_stay(tmp_path, stage, jsonl, addresses, tokenizer, monkeypatch):
    chosen = stage({"path": jsonl(addresses)})
    encode(tmp_path / "parts", chosen, tokenizer, 2, [0])

    def refuse(*args):
        raise DataError("no", "more", "text")

    monkeypatch.setattr(part_building, "write_index", refuse)
    with pytest.raises(DataError, match="no"):
        encode(tmp_path / "parts", chosen, tokenizer, 2)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["part-00000-of-00002"]


def test_a_source_without_a_document_is_said_by_the_merge(tmp_path, stage, jsonl, addresses, tokenizer):
    chosen = stage({"path": jsonl(addresses)}, {"name": "none", "path": jsonl(["", " ", None])})
    encode(tmp_path / "parts", chosen, tokenizer, 2)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"'none' holds no document: 2 x empty, first at .*:1: ''; 1 x not_text"):
        build(chosen, tmp_path / "out", tokenizer, opened(tmp_path / "parts", chosen))


@pytest.mark.parametrize("files", [1, 3, 11])
@pytest.mark.parametrize("total", [1, 2, 5])
def test_shares_are_all_records_once_and_of_like_size(tmp_path, files, total):
    for number in range(files):
        lines = [json.dumps({"text": f"{number} {line}"}) for line in range(100 + number)]
        (tmp_path / f"{number:02d}.jsonl").write_text("\n".join(lines))
    source = Source(path=str(tmp_path))
    found = []
    for part in range(total):
        reading = Share(part, total)
        found.append([(reading.place, text) for text in read_source(source, Rejected(), share=reading)])
        assert found[-1] == sorted(found[-1], key=lambda item: item[0])
    together = sorted((item for part in found for item in part), key=lambda item: item[0])
    assert [text for _, text in together] == list(read_source(source, Rejected()))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= np.mean(sizes) * 0.6


@pytest.mark.parametrize(
    "content", ["", "a b", b"\xff" * 500, " " * 200 + "x", "x" * 79 + "  y", "x" * 200, {"a": ["\ud800"] * 30}, None]
)
def test_shortened_content_gives_the_same_excerpt(content):
    whole, short = Rejected(), Rejected()
    whole.add("empty", "here", content)
    short.add("empty", "here", json.loads(json.dumps(shortened(content))))
    assert whole.report() == short.report()


def test_a_merge_opens_more_files_than_a_process_may_at_first(tmp_path, stage, jsonl, addresses, tokenizer):
    """With 64 parts and 30 sources, a merge met the usual limit of 1,024 files."""
    sources = [{"name": str(number), "path": jsonl(addresses[:100]), "weight": 1.0} for number in range(4)]
    chosen = stage(*sources)
    encode(tmp_path / "parts", chosen, tokenizer, 5)
    (tmp_path / "merged").mkdir()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 15, before[1]))
    try:
        build(chosen, tmp_path / "merged", tokenizer, opened(tmp_path / "parts", chosen))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(TokenStore.open(tmp_path / "merged" / "train")) > 0


def test_a_piece_leaves_its_ids_and_table_on_disk(tmp_path, stage, jsonl, addresses, tokenizer):
    chosen = stage({"path": jsonl(addresses[:100])})
    encode(tmp_path / "parts", chosen, tokenizer, 1)
    folder = tmp_path / "parts" / Part(0, 1).name
    piece = read_piece(folder, read_index(folder)["sources"][0][0], verify=True)
    assert all(isinstance(array.base, np.memmap) for array in (piece.tokens, piece.table))
