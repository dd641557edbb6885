"""Answer files in the judges' own formats, also after a start that was killed."""

import json

import pytest

from minima.errors import DataError
from minima.evaluation.judged import read_questions, temperature, write_answers
from minima.recipe.release import Answers

MT_BENCH = Answers(format="mt_bench", questions="q", max_new_tokens=7)
ALPACA = Answers(format="alpaca_eval", questions="q")
CONVERSATIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "And another."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Again?"]},
    {"question_id": 141, "category": "stem", "turns": ["为什么天是蓝的？", "再说一遍。"]},
]
INSTRUCTIONS = [
    {"instruction": "Name a colour.", "dataset": "helpful_base"},
    {"instruction": "Sum up.", "input": "A text.", "dataset": "koala"},
]


class Parrot:
    """Says how much it was told; remembers how it was asked."""

    def __init__(self, killed_at=None, too_long=()):
        self.asked, self.killed_at, self.too_long = [], killed_at, too_long

    def reply(self, messages, **options):
        if len(self.asked) == self.killed_at:
            raise KeyboardInterrupt
        self.asked.append((messages, options))
        if messages[-1]["content"] in self.too_long:
            raise DataError("too long", "no room", "shorten it")
        return f" {len(messages)}: {messages[-1]['content']} "


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(tmp_path, parrot, questions=CONVERSATIONS, answers=MT_BENCH, name="a.jsonl", seed=5):
    return write_answers(answers, questions, lambda: parrot, tmp_path / name, name="mini", seed=seed)


def test_mt_bench_in_fastchats_format(tmp_path):
    parrot = Parrot()
    counts = write(tmp_path, parrot)
    assert counts == {"questions": 3, "resumed": 0, "unanswered": 0}
    rows = lines(tmp_path / "a.jsonl")
    assert [set(row) for row in rows] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 3
    assert [row["question_id"] for row in rows] == [81, 111, 141]
    assert rows[2]["choices"] == [{"index": 0, "turns": ["1: 为什么天是蓝的？", "3: 再说一遍。"]}]
    assert {row["model_id"] for row in rows} == {"mini"} and len({row["answer_id"] for row in rows}) == 3
    second = parrot.asked[1][0]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == "1: Write a line."
    assert [options["temperature"] for _, options in parrot.asked] == [0.7, 0.7, 0.0, 0.0, 0.1, 0.1]
    assert {options["max_new_tokens"] for _, options in parrot.asked} == {7}


def test_alpaca_eval_outputs(tmp_path):
    parrot = Parrot()
    write(tmp_path, parrot, INSTRUCTIONS, ALPACA, "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == [
        {"instruction": "Name a colour.", "output": "1: Name a colour.", "generator": "mini",
         "dataset": "helpful_base"},
        {"instruction": "Sum up.", "input": "A text.", "output": "1: Sum up.\n\nA text.", "generator": "mini",
         "dataset": "koala"},
    ]  # fmt: skip
    assert {options["temperature"] for _, options in parrot.asked} == {0.0}


def test_a_killed_start_goes_on_and_gives_the_same(tmp_path):
    whole, killed, rest = Parrot(), Parrot(killed_at=3), Parrot()
    write(tmp_path, whole, name="whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, killed)
    assert not (tmp_path / "a.jsonl").exists()
    with open(tmp_path / "a.jsonl.answered", "a") as file:
        file.write('{"question": "cut o')  # the line that the kill tore
    assert write(tmp_path, rest)["resumed"] == 1
    assert rest.asked == whole.asked[2:]  # the seeds too
    assert [row["choices"] for row in lines(tmp_path / "a.jsonl")] == [
        row["choices"] for row in lines(tmp_path / "whole.jsonl")
    ]
    again = Parrot()
    assert write(tmp_path, again)["resumed"] == 3 and not again.asked


def test_an_answer_with_any_kind_of_line_break_is_kept(tmp_path):
    """Only a line feed ends a line of JSON lines."""
    turns = [f"a{mark}b" for mark in "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
    questions = [CONVERSATIONS[0] | {"turns": turns}]
    write(tmp_path, Parrot(), questions)
    again = Parrot()
    assert write(tmp_path, again, questions)["resumed"] == 1 and not again.asked
    answers = lines(tmp_path / "a.jsonl")[0]["choices"][0]["turns"]
    assert [answer.partition(": ")[2] for answer in answers] == turns


def test_an_answer_to_another_wording_is_not_kept(tmp_path):
    write(tmp_path, Parrot())
    changed = [CONVERSATIONS[0] | {"turns": ["Write a word."]}, *CONVERSATIONS[1:]]
    parrot = Parrot()
    assert write(tmp_path, parrot, changed)["resumed"] == 2
    assert [messages[-1]["content"] for messages, _ in parrot.asked] == ["Write a word."]
    assert lines(tmp_path / "a.jsonl")[0]["choices"][0]["turns"] == ["1: Write a word."]


def test_seeds_follow_the_question_and_not_its_place(tmp_path):
    first, second, other = Parrot(), Parrot(), Parrot()
    write(tmp_path, first, name="1")
    write(tmp_path, second, CONVERSATIONS[::-1], name="2")
    write(tmp_path, other, name="3", seed=6)
    seeds = [options["seed"] for _, options in first.asked]
    assert seeds[:2] == [options["seed"] for _, options in second.asked][-2:]
    assert len(set(seeds)) == 6
    assert not set(seeds) & {options["seed"] for _, options in other.asked}


def test_a_question_that_does_not_fit_is_counted(tmp_path):
    counts = write(tmp_path, Parrot(too_long=("And another.",)))
    assert counts["unanswered"] == 1
    assert lines(tmp_path / "a.jsonl")[0]["choices"][0]["turns"] == ["1: Write a line.", ""]


def test_when_nothing_fits_there_is_no_file(tmp_path):
    with pytest.raises(DataError, match="too long"):
        write(tmp_path, Parrot(too_long=[turn for row in CONVERSATIONS for turn in row["turns"]]))
    assert list(tmp_path.iterdir()) == []


def test_temperature_of_a_question():
    assert temperature({"category": "writing", "required_temperature": 0.3}, MT_BENCH) == 0.3
    assert temperature({"category": "unheard of"}, MT_BENCH) == 0.7


@pytest.mark.parametrize(
    ("answers", "text", "message"),
    [
        (MT_BENCH, None, "cannot be read"),
        (MT_BENCH, "{nonsense", "cannot be read"),
        (MT_BENCH, "", "is empty"),
        (MT_BENCH, '{"question_id": 1, "turns": []}', "question 1 must have a `question_id` and a list of `turns`"),
        (MT_BENCH, '{"question_id": 1, "turns": ["a"]}\n{"turns": ["b"]}', "question 2 must have"),
        (MT_BENCH, '{"question_id": 1, "turns": ["a", " "]}', "a list of `turns` of text"),
        (MT_BENCH, '{"question_id": 1, "turns": ["\\ud800"]}', "a list of `turns` of text"),
        *(
            (MT_BENCH, f'{{"question_id": 1, "turns": ["a"], "required_temperature": {wrong}}}', "required_temperature")
            for wrong in ("null", '"x"', "-1", "true", "1e999", "NaN")
        ),
        (ALPACA, '[{"instruction": "\\ud800"}]', "an `instruction` of text"),
        (
            MT_BENCH,
            '{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}',
            "contains a question twice",
        ),
        (ALPACA, '[{"instruction": " "}]', "question 1 must have an `instruction`"),
        (ALPACA, '["text"]', "question 1 must have"),
    ],
)
def test_bad_questions(tmp_path, answers, text, message):
    path = tmp_path / "q"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(path, answers)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_questions_with_raw_line_separators_blank_lines_and_a_byte_order_mark(tmp_path, encoding):
    question = {"question_id": 1, "turns": ["one\u2028two\x85three"]}
    text = json.dumps(question, ensure_ascii=False)
    (tmp_path / "a").write_text(f"{text}\r\n \t\r\n\n", encoding=encoding, newline="")
    (tmp_path / "b").write_text(f"[{text}]", encoding=encoding)
    assert read_questions(tmp_path / "a", MT_BENCH) == read_questions(tmp_path / "b", MT_BENCH) == [question]


def test_questions_as_lines_or_as_a_list(tmp_path):
    (tmp_path / "a").write_text("\n".join(map(json.dumps, CONVERSATIONS)) + "\n\n")
    (tmp_path / "b").write_text(json.dumps(CONVERSATIONS))
    assert read_questions(tmp_path / "a", MT_BENCH) == read_questions(tmp_path / "b", MT_BENCH) == CONVERSATIONS


def test_a_model_that_says_nothing_is_told(tmp_path, caplog):
    class Mute(Parrot):
        def reply(self, messages, **options):
            return "" if messages[-1]["content"] == "And another." else super().reply(messages, **options)

    assert write(tmp_path, Mute())["unanswered"] == 1
    assert "1 turns have an empty answer (the model returned no text)" in caplog.text
