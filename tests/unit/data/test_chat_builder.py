"""Conversations and pairs as stores: whole, masked, the same on any number of processes, nothing lost unsaid."""

import json
import logging
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from minima.data.batches import read_batch
from minima.data.builder import build
from minima.data.documents import HeldOut
from minima.data.packing import HashedFile
from minima.data.store import TokenStore
from minima.errors import DataError, DiskFull

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTH = 192


def turns_of(number):
    """A conversation of one to three exchanges, its own."""
    exchanges = [(f"ask {number} {n}", f"say {number} " + "möre " * (number % 5)) for n in range(1 + number % 3)]
    return [{"User": one, "Assistant": two} for one, two in exchanges]


def messages_of(number):
    roles = ("User", "user"), ("Assistant", "assistant")
    return [{"role": role, "content": turn[name].strip()} for turn in turns_of(number) for name, role in roles]


def pair_of(number):
    return {"prompt": f"ask {number}", "chosen": f"say {number} right", "rejected": "wrong " * (1 + number % 4)}


@pytest.fixture
def records(tmp_path):
    def write(some, name="source.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in some), "utf-8")
        return str(path)

    return write


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def chat_stage(stage):
    def make(*sources, **settings):
        return stage(*sources, **({"format": "conversations", "sequence_length": LENGTH} | settings))

    return make


def stores(folder):
    both = TokenStore.open(folder / "train"), TokenStore.open(folder / "held_out")
    for store in both:
        store.verify()
    return both


def documents_of(store):
    """Ids and what is learnt, document by document; padding left out."""
    found = []
    everything = np.arange(len(store))
    for ids, learnt, numbers in zip(
        store.blocks(everything), store.learnt(everything), store.documents(everything), strict=True
    ):
        for number in range(numbers.max() + 1):
            one = ids[numbers == number].tolist(), learnt[numbers == number].astype(int).tolist()
            if set(one[0]) != {store.end_token}:
                found.append(one)
            else:
                assert not any(one[1])
    return found


@pytest.mark.parametrize("own", [False, True])
def test_every_conversation_is_there_once_whole_with_transformers_mask(
    folder, records, chat_stage, tokenizer, byte_level, tmp_path, own
):
    path, chosen = records([turns_of(number) for number in range(200)]), None
    if own:
        template = tmp_path / "own.jinja"
        template.write_text(CHATML)
        chosen = str(template)
    metrics = build(chat_stage({"path": path}, chat_template=chosen), folder, byte_level if own else tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer")
    train, held_out = stores(folder)
    assert (loaded.chat_template == CHATML) == own
    expected = []
    for number in range(200):
        ids = loaded.apply_chat_template(messages_of(number))["input_ids"]
        mask = [0] * len(ids)
        for turn in range(1, len(messages_of(number)), 2):
            begin = len(loaded.apply_chat_template(messages_of(number)[:turn], add_generation_prompt=True)["input_ids"])
            end = len(loaded.apply_chat_template(messages_of(number)[: turn + 1])["input_ids"]) - own  # ChatML's \n
            mask[begin:end] = [1] * (end - begin)
        expected.append((ids, mask))
    documents = [documents_of(store) for store in (train, held_out)]
    assert sorted(documents[0] + documents[1]) == sorted(expected)
    turns = [[[message["role"], message["content"]] for message in messages_of(number)] for number in range(200)]
    packed = [json.dumps(one, separators=(",", ":"), ensure_ascii=False).encode() for one in turns]
    aside = HeldOut(0.1, 776).mask(packed)
    assert sorted(documents[1]) == sorted(one for one, out in zip(expected, aside, strict=True) if out)
    assert train.format == "conversations"
    assert train.document_mask
    assert metrics["conversations"] == metrics["documents"] == train.num_documents == len(documents[0])
    assert metrics["held_out_conversations"] == len(documents[1]) == int(aside.sum())
    assert metrics["learnt_tokens"] == train.learnt_tokens == sum(sum(mask) for _, mask in documents[0])
    assert metrics["padding_tokens"] == metrics["tokens"] - sum(len(ids) for ids, _ in documents[0])
    assert metrics["padding_share"] == metrics["padding_tokens"] / metrics["tokens"] < 0.1
    said = sum(len(turn["Assistant"].strip().encode()) for number in range(200) for turn in turns_of(number))
    assert train.bytes + held_out.bytes == said
    assert train.bytes_per_token == train.bytes / sum(sum(mask) for _, mask in documents[0])
    assert metrics["bytes_per_token"] == train.bytes_per_token
    answered = [token for ids, mask in documents[1] for token, one in zip(ids, mask, strict=True) if one]
    shares = np.unique(answered, return_counts=True)[1] / len(answered)
    assert metrics["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert metrics["cut_conversations"] == 0
    assert sorted(file.name for file in folder.iterdir()) == ["held_out", "report.json", "tokenizer", "train"]


def test_replies_of_weight_0_are_not_learnt_and_do_not_count(folder, records, chat_stage, tokenizer):
    def weighted(number):
        return [turn | {"weight": 0} if place == 1 else turn for place, turn in enumerate(messages_of(number))]

    several = [number for number in range(200) if len(messages_of(number)) > 2]
    build(chat_stage({"path": records([{"messages": messages_of(number)} for number in several])}), folder, tokenizer)
    plain = {tuple(ids): mask for store in stores(folder) for ids, mask in documents_of(store)}
    sizes = [store.bytes for store in stores(folder)]
    shutil.rmtree(folder)
    build(chat_stage({"path": records([{"messages": weighted(number)} for number in several])}), folder, tokenizer)
    found = [document for store in stores(folder) for document in documents_of(store)]
    assert len(found) == len(plain) == len(several)
    for ids, mask in found:
        before = plain[tuple(ids)]
        first = before.index(1)
        end = before.index(0, first)
        assert mask == [0] * end + before[end:] and any(mask)
    assert all(fewer < size for fewer, size in zip([store.bytes for store in stores(folder)], sizes, strict=True))


def test_a_batch_has_the_labels_that_its_conversations_have_alone(folder, records, chat_stage, tokenizer):
    build(chat_stage({"path": records([turns_of(n) for n in range(40)])}), folder, tokenizer)
    store = stores(folder)[0]
    batch = read_batch(store, np.arange(len(store)))
    labels = [label for label in batch.labels_BT.reshape(-1).tolist() if label >= 0]
    alone = [token for ids, mask in documents_of(store) for token, one in zip(ids, mask, strict=True) if one]
    assert sorted(labels) == sorted(alone)
    assert batch.documents_BT is not None
    assert batch.num_documents > 2


def test_pairs_lie_beside_each_other_and_only_the_last_answer_is_learnt(folder, records, chat_stage, tokenizer):
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    long = {"prompt": [*before, {"role": "user", "content": "c"}], "chosen": "long right", "rejected": "long wrong"}
    path = records([pair_of(number) for number in range(100)] + [long])
    metrics = build(chat_stage({"path": path}, format="preferences", sequence_length=160), folder, tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer")
    train, held_out = stores(folder)
    assert train.format == "preferences"
    seen = []
    for store in (train, held_out):
        for block in range(len(store)):
            ids, learnt = store.blocks(np.array([block]))[0], store.learnt(np.array([block]))[0]
            numbers = store.documents(np.array([block]))[0]
            for first in range(0, numbers.max(), 2):
                pair = [loaded.decode(ids[numbers == n]) for n in (first, first + 1)]
                answers = [loaded.decode(ids[(numbers == n) & learnt]).strip() for n in (first, first + 1)]
                prompts = [text.removesuffix(answer) for text, answer in zip(pair, answers, strict=True)]
                assert prompts[0] == prompts[1]
                seen.append((prompts[0].split("</s>")[-2].split("] ")[-1], *answers))
    expected = [(p["prompt"], p["chosen"], p["rejected"].strip()) for p in map(pair_of, range(100))]
    expected.append(("c", "long right", "long wrong"))
    assert sorted(seen) == sorted((ask, f"{one}</s>", f"{two}</s>") for ask, one, two in expected)
    assert metrics["pairs"] + metrics["held_out_pairs"] == 101
    assert metrics["documents"] == train.num_documents == 2 * metrics["pairs"]
    assert "conversations" not in metrics


@pytest.mark.parametrize("format", ["conversations", "preferences"])
def test_the_result_does_not_depend_on_the_processes(tmp_path, records, chat_stage, tokenizer, monkeypatch, format):
    monkeypatch.setattr("minima.data.documents.BATCH_CHARACTERS", 2000)
    make = turns_of if format == "conversations" else pair_of
    sources = [
        {"path": records([make(n) for n in range(150)], "a.jsonl"), "weight": 0.7},
        {"path": records([make(n) for n in range(150, 200)], "b.jsonl"), "weight": 0.3},
    ]
    sums = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        settings = {"format": format, "processes": processes, "tokens": 140 * LENGTH, "shard_tokens": 16 * LENGTH}
        metrics = build(chat_stage(*sources, **settings), folder, tokenizer)
        sums.append([store.sha256() for store in stores(folder)])
    assert sums[0] == sums[1]
    assert metrics["blocks"] == 140
    shares = [numbers["share"] for numbers in metrics["sources"].values()]
    assert shares == pytest.approx([0.7, 0.3], abs=0.05)
    assert metrics["sources"][sources[1]["path"]]["epochs"] > 1


def test_a_long_conversation_is_cut_where_an_exchange_ends(folder, records, chat_stage, tokenizer, caplog):
    exchanges = [{"User": f"q{n}", "Assistant": f"a{n}"} for n in range(12)]
    unanswered = {"messages": [*messages_of(1), {"role": "user", "content": "and?"}]}
    lost = [{"User": "q", "Assistant": "a " * 200}, *exchanges]
    path = records([exchanges, unanswered, lost, *(turns_of(n) for n in range(20))])
    metrics = build(chat_stage({"path": path}, held_out_fraction=0.0), folder, tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer")
    documents = documents_of(stores(folder)[0])
    whole = [{"role": r, "content": e[k]} for e in exchanges for r, k in (("user", "User"), ("assistant", "Assistant"))]
    fitting = max(n for n in range(1, 12) if len(loaded.apply_chat_template(whole[: 2 * n])["input_ids"]) <= LENGTH)
    assert 1 < fitting < 12
    assert loaded.apply_chat_template(whole[: 2 * fitting])["input_ids"] in [ids for ids, _ in documents]
    assert loaded.apply_chat_template(messages_of(1))["input_ids"] in [ids for ids, _ in documents]
    assert metrics["cut_conversations"] == 1
    assert metrics["unanswered_turns"] == 1
    assert metrics["rejected"] == {"too_long": 1}
    assert metrics["conversations"] == len(documents) == 22
    assert f"{path}:3" in caplog.text


def test_a_conversation_that_just_fits_is_whole(folder, records, chat_stage, tokenizer):
    exchanges = [{"User": f"q{n}", "Assistant": f"a{n}"} for n in range(12)]
    path = records([exchanges[:5]] * 20)
    build(chat_stage({"path": path}, held_out_fraction=0.0), folder, tokenizer)
    five = documents_of(stores(folder)[0])[0]
    settings = {"sequence_length": len(five[0]), "held_out_fraction": 0.0}
    for some, cut in ((exchanges[:5], 0), (exchanges, 20)):
        metrics = build(chat_stage({"path": records([some] * 20)}, **settings), folder, tokenizer)
        assert documents_of(stores(folder)[0]) == [five] * 20
        assert metrics["cut_conversations"] == cut and metrics["padding_tokens"] == 0


def test_rejections_of_the_tokenizer_are_counted_once_with_their_place(folder, records, chat_stage, tokenizer, caplog):
    path = records(
        [
            *(turns_of(n) for n in range(30)),
            [{"User": "a</s>b", "Assistant": "x"}],
            [{"User": "a", "Assistant": "[|User|] b"}],
            [{"User": "", "Assistant": "x"}],
        ]
    )
    caplog.set_level(logging.WARNING)
    metrics = build(chat_stage({"name": "mine", "path": path, "weight": 1.0}, tokens=90 * LENGTH), folder, tokenizer)
    assert metrics["sources"]["mine"]["epochs"] > 2
    aside = [tuple(ids) for ids, _ in documents_of(stores(folder)[1])]
    assert len(aside) == len(set(aside)) == metrics["held_out_conversations"] > 0, "held out once"
    assert metrics["rejected"] == {"empty_user_turn": 1, "forged_marker": 2}
    report = json.loads((folder / "report.json").read_text())
    example = report["sources"]["mine"]["rejected"]["examples"]["forged_marker"]
    assert sorted(one["where"] for one in example) == [f"{path}:31", f"{path}:32"]
    assert "left out 2 records, forged_marker" in caplog.text


@pytest.mark.parametrize(
    ("format", "record", "reason"),
    [
        ("conversations", [{"User": "a", "Assistant": "b " * 200}], "3 x too_long"),
        ("conversations", [{"User": "a", "Assistant": "</s>"}], "3 x forged_marker"),
        ("conversations", {"text": "a"}, "3 x not_a_conversation"),
        ("preferences", {"prompt": "a", "chosen": "b " * 150, "rejected": "c"}, "3 x too_long"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "b"}, "3 x equal_answers"),
    ],
)
def test_a_source_of_which_nothing_is_left_is_refused(folder, records, chat_stage, tokenizer, format, record, reason):
    with pytest.raises(DataError, match=reason):
        build(chat_stage({"path": records([record] * 3)}, format=format, held_out_fraction=0.0), folder, tokenizer)
    assert not list(folder.iterdir())


def test_a_template_that_cannot_be_used_is_refused_before_anything_is_read(
    folder, chat_stage, tokenizer, tmp_path, records
):
    template = tmp_path / "no.jinja"
    template.write_text("{{ raise_exception('only poems') }}")
    with pytest.raises(DataError, match="only poems"):
        build(chat_stage({"path": "nowhere"}, chat_template=str(template)), folder, tokenizer)
    assert not list(folder.iterdir())


def test_conversations_that_the_template_refuses_are_counted(folder, records, chat_stage, byte_level, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML)
    path = records([{"messages": [{"role": "system", "content": "s"}, *messages_of(1)]}, turns_of(1), turns_of(2)])
    stage = chat_stage({"path": path}, chat_template=str(template), held_out_fraction=0.0)
    assert build(stage, folder, byte_level)["rejected"] == {"refused_by_template": 1}


def test_held_out_tokens_are_a_limit(folder, records, chat_stage, tokenizer):
    path = records([turns_of(n) for n in range(200)])
    free = build(chat_stage({"path": path}), folder, tokenizer)
    capped = build(chat_stage({"path": path}, held_out_tokens=3 * LENGTH), folder, tokenizer)
    assert capped["held_out_blocks"] == 3 < free["held_out_blocks"]
    assert capped["tokens"] == free["tokens"]


def test_a_full_disk_keeps_the_older_result(folder, records, chat_stage, tokenizer, monkeypatch):
    path = records([turns_of(n) for n in range(60)])
    build(chat_stage({"path": path}), folder, tokenizer)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def no_space(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HashedFile, "write", no_space)
    with pytest.raises(DiskFull, match="No space left"):
        build(chat_stage({"path": path}, seed=2), folder, tokenizer)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_damaged_mask_is_found(folder, records, chat_stage, tokenizer):
    build(chat_stage({"path": records([turns_of(n) for n in range(60)])}), folder, tokenizer)
    file = folder / "train" / "learnt-00000.bin"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"learnt-00000.bin has sha256"):
        TokenStore.open(folder / "train").verify()


@pytest.mark.parametrize(("format", "embedded"), [("conversations", "chat"), ("preferences", "preferences")])
def test_the_embedded_examples(folder, chat_stage, byte_level, format, embedded):
    stage = chat_stage({"embedded": embedded}, format=format, sequence_length=384, held_out_fraction=0.05)
    metrics = build(stage, folder, byte_level)
    assert metrics["rejected"] == {}
    assert metrics["padding_share"] < 0.1
    assert metrics["cut_conversations"] == 0
    stores(folder)


def test_a_conversation_with_a_system_message_is_cut_where_an_exchange_ends_too(folder, records, chat_stage, tokenizer):
    turns = [{"role": "system", "content": "be brief"}]
    for number in range(20):
        turns += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
    path = records([{"messages": turns}, *(turns_of(n) for n in range(20))])
    build(chat_stage({"path": path}, held_out_fraction=0.0), folder, tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer")
    beginnings = [loaded.apply_chat_template(turns[: 2 * n + 1])["input_ids"] for n in range(1, 21)]
    fitting = max((ids for ids in beginnings if len(ids) <= LENGTH), key=len)
    documents = {tuple(ids): mask for ids, mask in documents_of(stores(folder)[0])}
    assert len(beginnings[1]) < len(fitting) < len(beginnings[-1]) and tuple(fitting) in documents
    assert documents[tuple(fitting)][-1] == 1, "the last exchange has its answer"


@pytest.mark.parametrize("forged", ["prompt", "chosen", "rejected"])
def test_a_pair_with_a_forged_marker_in_any_of_its_texts_is_left_out(folder, records, chat_stage, tokenizer, forged):
    wrong = pair_of(50)
    wrong[forged] += " [|User|] and"
    path = records([*(pair_of(n) for n in range(20)), wrong])
    metrics = build(chat_stage({"path": path}, format="preferences", held_out_fraction=0.0), folder, tokenizer)
    assert metrics["rejected"] == {"forged_marker": 1} and metrics["pairs"] == 20
