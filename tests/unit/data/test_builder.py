"""The whole build: same result on any number of processes, right proportions, nothing lost without a word."""

import json
import logging
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from minima.data.builder import build
from minima.data.documents import HeldOut, Rejected, batched, shuffled
from minima.data.encoding import Encoder, EncodingPool
from minima.data.packing import HashedFile
from minima.data.store import TokenStore
from minima.data.tokenizer import load_tokenizer
from minima.errors import DataError, DiskFull
from minima.recipe.data import TokenizerTraining
from minima.recipe.schema import BuildData
from minima.stages import build_data


def stores(folder):
    """Training and held-out store, checked."""
    both = TokenStore.open(folder / "train"), TokenStore.open(folder / "held_out")
    for store in both:
        store.verify()
    return both


def documents_of(store, tokenizer):
    """The texts of a store's whole documents."""
    stream, starts = store.blocks(np.arange(len(store))).reshape(-1), store.document_starts()
    pieces = [stream[begin:end] for begin, end in zip(starts, [*starts[1:], len(stream)], strict=True)]
    whole = [piece[:-1].tolist() for piece in pieces if len(piece) and piece[-1] == store.end_token]
    return [tokenizer.decode(piece) for piece in whole]


def test_every_document_is_on_one_side_and_whole(tmp_path, stage, jsonl, addresses, tokenizer):
    path = jsonl(addresses)
    metrics = build(stage({"path": path}), tmp_path, tokenizer)
    train, held_out = stores(tmp_path)
    loaded = load_tokenizer(tmp_path / "tokenizer")
    learnt, aside = documents_of(train, loaded), documents_of(held_out, loaded)
    mask = HeldOut(0.1, 776).mask([text.encode() for text in addresses])
    expected = {text for text, out in zip(addresses, mask, strict=True) if out}
    assert 20 < len(expected) < 60
    assert set(aside) <= expected
    assert len(expected) - len(aside) <= 2  # the tail of less than a block is dropped
    assert set(learnt) <= set(addresses) - expected
    assert len(addresses) - len(expected) - len(learnt) <= 2
    assert learnt != [text for text in addresses if text in set(learnt)]  # another order than the file's
    tokens = sum(len(ids) + 1 for ids in loaded(addresses)["input_ids"])
    dropped = metrics["dropped_tail_tokens"] + metrics["held_out_dropped_tail_tokens"]
    assert metrics["tokens"] + metrics["held_out_tokens"] + dropped == tokens
    assert metrics["blocks"] == len(train) == metrics["tokens"] // 32
    size = sum(len(text.encode()) for text in addresses)
    assert abs(train.bytes + held_out.bytes + dropped * metrics["bytes_per_token"] - size) < 0.01 * size
    assert metrics["bytes_per_token"] == pytest.approx(train.bytes_per_token, rel=1e-3)
    assert metrics["sources"][path]["epochs"] == 1.0
    assert json.loads((tmp_path / "report.json").read_text())["tokens"] == metrics["tokens"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["held_out", "report.json", "tokenizer", "train"]


def test_documents_begin_as_the_tokenizer_begins_a_text(tmp_path, stage, jsonl, addresses, tokenizer, beginning):
    source, loaded = {"path": jsonl(addresses)}, load_tokenizer(beginning)
    assert build(stage(source), tmp_path, beginning)["begin_token"] == loaded.bos_token_id
    for store in stores(tmp_path):
        stream, starts = store.blocks(np.arange(len(store))).reshape(-1), store.document_starts()
        assert len(starts) > 5
        assert (stream[starts] == loaded.bos_token_id).all()
        assert (stream == loaded.bos_token_id).sum() == len(starts), "nowhere else"
        second = stream[starts[0] : starts[1]]
        assert second.tolist() == [*loaded(loaded.decode(second[1:-1]))["input_ids"], store.end_token]
    assert build(stage(source), tmp_path, tokenizer)["begin_token"] is None
    train, _ = stores(tmp_path)
    assert loaded.bos_token_id not in train.blocks(np.arange(len(train)))


def test_documents_begin_as_the_recipe_says(
    tmp_path, stage, jsonl, addresses, tokenizer, beginning, byte_level, caplog
):
    source = {"path": jsonl(addresses)}
    without = build(stage(source, add_bos_token=False), tmp_path, beginning)
    assert without["begin_token"] is None and "documents begin without '<s>'" in caplog.text
    caplog.clear()
    assert build(stage(source, add_bos_token=True), tmp_path, beginning)["begin_token"] == 1
    assert "but the tokenizer itself" not in caplog.text
    assert build(stage(source, add_bos_token=True), tmp_path, tokenizer)["begin_token"] == 1
    text = "documents begin with '<s>', but the tokenizer itself, and so the exported model, begins texts without it"
    assert text in caplog.text
    caplog.clear()
    (tmp_path / "lone").mkdir()
    shutil.copy(tokenizer / "tokenizer.model", tmp_path / "lone")
    lone = str(tmp_path / "lone")
    assert build(stage(source, tokenizer=lone), tmp_path, lone)["begin_token"] is None
    assert "a tokenizer.model alone does not say" in caplog.text
    with pytest.raises(DataError, match="has no begin token"):
        build(stage(source, add_bos_token=True), tmp_path, byte_level)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"add_bos_token": True, "tokenizer": TokenizerTraining(vocabulary_size=300)}, "its own tokenizer"),
        ({"add_bos_token": False, "format": "conversations"}, "for conversations"),
    ],
)
def test_a_begin_token_that_would_not_be_read_is_refused(stage, settings, words):
    with pytest.raises(ValidationError, match=words):
        stage({"path": "x"}, **settings)


def test_unigram_entropy_is_that_of_the_held_out_tokens(tmp_path, stage, jsonl, addresses, tokenizer, monkeypatch):
    monkeypatch.setattr("minima.data.build_report._ENTROPY_TOKENS", 100)
    read, blocks = [], TokenStore.blocks
    monkeypatch.setattr(TokenStore, "blocks", lambda *args: read.append(blocks(*args)) or read[-1])
    metrics = build(stage({"path": jsonl(addresses)}), tmp_path, tokenizer)
    assert max(array.size for array in read) <= 100, "tokens, however long a block is"
    store = stores(tmp_path)[1]
    stream = store.blocks(np.arange(len(store))).reshape(-1).tolist()
    shares = [stream.count(token) / len(stream) for token in stream]
    assert metrics["unigram_entropy"] == pytest.approx(-np.mean(np.log(shares)))


def test_the_result_does_not_depend_on_the_processes(tmp_path, stage, jsonl, addresses, tokenizer, monkeypatch):
    monkeypatch.setattr("minima.data.documents.BATCH_CHARACTERS", 2000)
    sources = [{"path": jsonl(addresses[:300]), "weight": 0.7}, {"path": jsonl(addresses[300:]), "weight": 0.3}]
    sums = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        build(stage(*sources, processes=processes, tokens=20_000, shard_tokens=4096), folder, tokenizer)
        sums.append([store.sha256() for store in stores(folder)])
    assert sums[0] == sums[1]


@pytest.mark.parametrize("tokens", [None, 30_000])
def test_weights_are_shares_of_the_tokens(tmp_path, stage, jsonl, addresses, tokenizer, tokens):
    long = [" ".join(addresses[number : number + 2]) for number in range(0, 350, 2)]  # documents are not what counts
    big, small = jsonl(long), jsonl(addresses[350:])
    sources = [{"name": "big", "path": big, "weight": 3.0}, {"name": "small", "path": small, "weight": 1.0}]
    metrics = build(stage(*sources, tokens=tokens), tmp_path, tokenizer)
    assert metrics["sources"]["big"]["share"] == pytest.approx(0.75, abs=0.03)
    if tokens is None:  # all of the big source once, the small one again and again
        assert metrics["sources"]["big"]["epochs"] == pytest.approx(1.0, abs=0.1)
        assert metrics["sources"]["small"]["epochs"] > 1.8
    else:
        assert metrics["tokens"] == tokens // 32 * 32
        read = sum(numbers["tokens"] for numbers in metrics["sources"].values())
        assert metrics["tokens_beyond_budget"] == read - metrics["tokens"] < 2048
    held_out = documents_of(stores(tmp_path)[1], load_tokenizer(tokenizer))
    assert len(held_out) == len(set(held_out))  # repeated sources are held out once


def test_without_weights_every_source_is_read_before_any_is_repeated(
    tmp_path, stage, jsonl, addresses, tokenizer, caplog
):
    caplog.set_level(logging.INFO, logger="minima.data")
    sources = [{"name": "big", "path": jsonl(addresses[:350])}, {"name": "small", "path": jsonl(addresses[350:])}]
    once = build(stage(*sources), tmp_path, tokenizer)
    assert {name: numbers["epochs"] for name, numbers in once["sources"].items()} == {"big": 1.0, "small": 1.0}
    available = once["tokens"] + once["dropped_tail_tokens"]
    assert "times to fill" not in caplog.text
    more = build(stage(*sources, tokens=int(1.5 * available)), tmp_path, tokenizer)
    assert "source big: its documents were read" in caplog.text
    assert all(1.0 <= numbers["epochs"] <= 2.0 for numbers in more["sources"].values())
    assert more["tokens"] == int(1.5 * available) // 32 * 32
    stream = stores(tmp_path)[0].blocks(np.arange(more["blocks"])).reshape(-1)
    assert not np.array_equal(stream[: available // 3], stream[available : available + available // 3])


def test_held_out_tokens_are_a_limit_in_whole_blocks(tmp_path, stage, jsonl, addresses, tokenizer):
    free = build(stage({"path": jsonl(addresses)}), tmp_path, tokenizer)
    capped = build(stage({"path": jsonl(addresses)}, held_out_tokens=200), tmp_path, tokenizer)
    assert capped["held_out_tokens"] == 192
    assert capped["tokens"] == free["tokens"]  # what is beyond the limit is not trained on


@pytest.mark.parametrize("limits", [{"held_out_tokens": 4096}, {"tokens": 12_000}])
def test_held_out_text_is_mixed_as_the_training_text_is(tmp_path, stage, jsonl, addresses, tokenizer, limits):
    """Whatever part of it is kept, or evaluated on: a source's first batch may hold all of its documents."""
    texts = {"one": addresses[:200], "other": addresses[200:]}
    sources = [{"name": name, "path": jsonl(texts[name]), "weight": 1.0} for name in texts]
    metrics = build(stage(*sources, held_out_fraction=0.3, **limits), tmp_path, tokenizer)
    counts = {name: metrics["sources"][name]["held_out_documents"] for name in texts}
    assert sum(counts.values()) == metrics["held_out_documents"] > 20
    assert min(counts.values()) > 0.35 * sum(counts.values())
    whole = documents_of(stores(tmp_path)[1], load_tokenizer(tokenizer))
    first_half = [text in texts["one"] for text in whole[: len(whole) // 2]]
    assert 0.25 < np.mean(first_half) < 0.75
    share = metrics["held_out_tokens"] / (metrics["held_out_tokens"] + metrics["tokens"])
    if "tokens" in limits:
        assert share == pytest.approx(0.3, abs=0.06)


def test_another_seed_orders_and_holds_out_others(tmp_path, stage, jsonl, addresses, tokenizer):
    path, sums = jsonl(addresses), set()
    for seed in (1, 1, 2):
        build(stage({"path": path}, seed=seed), tmp_path, tokenizer)
        sums.add(tuple(store.sha256() for store in stores(tmp_path)))
    assert len(sums) == 2


def test_a_tokenizer_in_the_home_folder(tmp_path, stage, jsonl, addresses, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tokenizer.parent))
    build(stage({"path": jsonl(addresses[:100])}), tmp_path, f"~/{tokenizer.name}")
    assert (tmp_path / "tokenizer" / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()


def test_rejected_records_are_in_the_report(tmp_path, stage, jsonl, addresses, tokenizer, caplog):
    path = jsonl([*addresses, "", 7, None])
    metrics = build(stage({"name": "mine", "path": path, "weight": 2.0}, tokens=120_000), tmp_path, tokenizer)
    assert metrics["rejected"] == {"empty": 1, "not_text": 2}  # counted once, though the source is read twice
    assert metrics["sources"]["mine"]["epochs"] > 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sources"]["mine"]["rejected"]["examples"]["empty"][0]["where"] == f"{path}:401"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"source mine: left out 1 record, empty\n  {path}:401: ''",
        f"source mine: left out 2 records, not_text\n  {path}:402: '7'\n  {path}:403: 'None'",
    ]


def test_a_tokenizer_is_trained_on_training_documents_only(tmp_path, stage, jsonl, addresses, monkeypatch):
    seen = []

    def train(texts, size):
        seen.extend(texts)
        raise DataError("enough", "seen", "all")

    monkeypatch.setattr("minima.data.builder.train_sentencepiece", train)
    one, two = {"name": "one", "path": jsonl(addresses[:200])}, {"name": "two", "path": jsonl(addresses[200:])}
    aside = HeldOut(0.1, 776).mask([text.encode() for text in addresses])
    training = [text for text, out in zip(addresses, aside, strict=True) if not out]

    def texts_of(**settings):
        seen.clear()
        rule = TokenizerTraining(vocabulary_size=512, **settings)
        with pytest.raises(DataError, match="enough"):
            build(stage(one, two, tokenizer=rule), tmp_path, rule)
        return list(seen)

    assert sorted(texts_of()) == sorted(training)
    assert set(texts_of(sources=["two"])) == set(training) & set(addresses[200:])
    assert sum(map(len, texts_of(max_characters=5000))) == 5000
    with pytest.raises(DataError, match="three, but no source has this label"):
        build(stage(one, two), tmp_path, TokenizerTraining(vocabulary_size=512, sources=["three"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"sequence_length": 100_000}, "less than one block of 100000"),
        ({"held_out_fraction": 0.0001}, "(?s)chose 0 of 50 documents.*a plain text file is one document"),
        ({"held_out_fraction": 0.9999}, "are held out"),
    ],
)
def test_too_little_text_is_said_and_nothing_is_left(tmp_path, stage, jsonl, addresses, tokenizer, settings, what):
    with pytest.raises(DataError, match=what):
        build(stage({"path": jsonl(addresses[:50])}, **settings), tmp_path, tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_all_held_out_tells_how_many_though_none_of_them_were_kept(
    tmp_path, stage, jsonl, addresses, tokenizer
):
    rule = HeldOut(0.9, stage({"path": "x"}).seed)
    lone = next(text for text in addresses[300:] if rule.mask([text.encode()])[0])
    sources = [{"path": jsonl(addresses[:300])}, {"name": "lone", "path": jsonl([lone])}]
    with pytest.raises(DataError, match="all 1 documents of source 'lone' are held out"):
        build(stage(*sources, held_out_fraction=0.9, held_out_tokens=64), tmp_path, tokenizer)


def test_few_documents_are_built_where_nobody_asked_for_held_out_text(tmp_path, jsonl, addresses, tokenizer, caplog):
    few = BuildData(name="c", kind="build_data", sources=[{"path": str(jsonl(addresses[:10]))}], tokenizer="t",
                    sequence_length=64)  # fmt: skip
    metrics = build(few, tmp_path, tokenizer)
    assert metrics["held_out_blocks"] == 0 and len(stores(tmp_path)[0])
    assert (
        "c: held_out_fraction 0.005 chose 0 of 10 documents" in caplog.text and "to change that, raise" in caplog.text
    )
    with pytest.raises(DataError, match="chose 0 of 10 documents"):  # before anything is trained
        build(few, tmp_path, tokenizer, evaluated=True)


@pytest.mark.parametrize("second", ["missing.jsonl", "empty.jsonl"])
def test_what_is_wrong_with_a_later_source_is_said_while_a_tokenizer_is_trained(
    tmp_path, stage, jsonl, addresses, second
):
    """SentencePiece would raise an error of its own in its place."""
    (tmp_path / "empty.jsonl").touch()
    sources = [{"path": jsonl(addresses[:50])}, {"path": str(tmp_path / second)}]
    with pytest.raises(DataError, match=second) as error:
        build(stage(*sources), tmp_path / "out", TokenizerTraining(vocabulary_size=300))
    assert "SentencePiece" not in str(error.value)


def test_without_held_out_documents_the_store_is_empty(tmp_path, stage, jsonl, addresses, tokenizer):
    metrics = build(stage({"path": jsonl(addresses)}, held_out_fraction=0.0), tmp_path, tokenizer)
    assert len(stores(tmp_path)[1]) == metrics["held_out_blocks"] == 0
    assert metrics["unigram_entropy"] is None


def test_a_full_disk_keeps_the_older_result(tmp_path, stage, jsonl, addresses, tokenizer, monkeypatch):
    path = jsonl(addresses)
    build(stage({"path": path}), tmp_path, tokenizer)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def no_space(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HashedFile, "write", no_space)
    with pytest.raises(DiskFull, match="No space left"):
        build(stage({"path": path}, seed=2), tmp_path, tokenizer)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_worker_that_dies_is_said(tokenizer):
    make = partial(Encoder, tokenizer / "nowhere", 2, 512)
    with EncodingPool(make, 2) as pool, pytest.raises(DataError, match="ended unexpectedly"):
        pool.result(pool._pool.submit(int))


def test_the_stage(tmp_path, stage, jsonl, addresses, tokenizer, caplog):
    (tmp_path / "other").mkdir()
    (tmp_path / "corpus").mkdir()
    first = stage({"path": jsonl(addresses)}, tokenizer={"vocabulary_size": 400})
    second = stage({"path": jsonl(addresses)}, tokenizer="corpus").model_copy(update={"name": "other"})
    recipe = SimpleNamespace(stages=[first, second])
    caplog.set_level(logging.INFO, logger="minima.data")
    for one in (first, second):
        context = SimpleNamespace(
            recipe=recipe, stage=one, folder=tmp_path / one.name, data=lambda name: tmp_path / name
        )
        metrics = build_data.run(context)
        assert metrics["vocabulary_size"] == 400
    assert "training a tokenizer of 400 pieces" in caplog.text
    for name in ("train/tokens-00000.bin", "tokenizer/tokenizer.model"):
        assert (tmp_path / "corpus" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


# -- documents ---------------------------------------------------------------------------------------------------


def test_a_window_bounds_what_waits():
    waiting, most = 0, 0

    def texts():
        nonlocal waiting, most
        for number in range(1000):
            waiting += 1
            most = max(most, waiting)
            yield f"{number:010d}"

    order = []
    for text in shuffled(texts(), "seed", window_characters=500):
        waiting -= 1
        order.append(int(text))
    assert sorted(order) == list(range(1000))
    assert most <= 51
    assert order != sorted(order)
    assert max(number - position for position, number in enumerate(order)) <= 51  # no further ahead than the window


def test_a_source_that_fits_is_permuted_as_a_whole():
    texts = [str(number) for number in range(300)]
    one, again, other = (list(shuffled(texts, seed)) for seed in ("a", "a", "b"))
    assert one == again != other
    assert sorted(one) == sorted(texts)
    assert abs(np.corrcoef([int(text) for text in one], range(300))[0, 1]) < 0.2


def test_held_out_follows_from_the_text_and_the_seed():
    contents = [str(number).encode() for number in range(20_000)]
    mask = HeldOut(0.05, 1).mask(contents)
    assert abs(mask.mean() - 0.05) < 0.005
    assert np.array_equal(HeldOut(0.05, 1).mask(contents[::-1])[::-1], mask)
    assert abs((mask & HeldOut(0.05, 2).mask(contents)).mean() - 0.05**2) < 0.002
    assert not (mask & ~HeldOut(0.1, 1).mask(contents)).any()  # a larger share holds out the same ones too


def test_batches_keep_order_and_size(monkeypatch):
    monkeypatch.setattr("minima.data.documents.BATCH_CHARACTERS", 10)
    assert list(batched(["aaaa", "bbbb", "cccc", "d" * 30, "e"])) == [["aaaa", "bbbb", "cccc"], ["d" * 30], ["e"]]


def test_nothing_rejected_is_said_so():
    assert Rejected().describe() == "no record was found"
