"""Answers to a judge's questions in the judge's own file format: FastChat's for MT-Bench, and AlpacaEval's outputs.

The judging itself is left to these projects: it needs a stronger model, which does not run here.
"""

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minima.disk import write_whole
from minima.errors import DataError
from minima.recipe.release import Answers

# From FastChat, llm_judge/common.py, `temperature_config`, with its default for other categories.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7
logger = logging.getLogger(__name__)


class Replies(Protocol):
    """The part of a `Generator` that is used here."""

    def reply(self, messages: list[dict[str, str]], **options: Any) -> str: ...


def read_questions(path: Path, answers: Answers) -> list[dict[str, Any]]:
    """Read a file of questions: JSON lines, or one JSON list.

    Raises:
        DataError: the file is missing, empty or not JSON, or a question is incomplete or appears twice.
    """
    where = f"questions {path} ({answers.format})"
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in _lines(text)]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{where} cannot be read: {error}",
            "there are no questions to answer",
            "give the project's own question file: JSON lines, or a JSON list",
        ) from None
    alpaca = answers.format == "alpaca_eval"
    for number, row in enumerate(rows):
        good = isinstance(row, dict) and (_is_instruction(row) if alpaca else _is_conversation(row))
        if not good:
            needs = "an `instruction` of text" if alpaca else "a `question_id` and a list of `turns` of text"
            more = "" if alpaca else ", and, if given, a `required_temperature` of at least 0"
            raise DataError(
                f"{where}: question {number + 1} must have {needs}{more}",
                "it could not be answered as the judge expects",
                "give the project's own question file, unchanged",
            )
    names = [_key(row, answers.format) for row in rows]
    if not rows or len(set(names)) < len(names):
        raise DataError(
            f"{where} {'contains a question twice' if rows else 'is empty'}",
            "the judge expects one answer per question",
            "give the project's own question file, unchanged",
        )
    return rows


def write_answers(
    answers: Answers,
    questions: Sequence[Mapping[str, Any]],
    load: Callable[[], Replies],
    path: Path,
    *,
    name: str,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Answer every question that has no answer yet.

    Each answer is on disk before the next is started (in `PATH.answered`, one per line), so that a killed run resumes
    after the last one; the judge's file is written once all answers exist.

    Args:
        load: returns the generator; called only if there is something left to answer.
        path: the judge's file.
        name: of the model, as the judge's tables show it.
        seed: of the sampling, combined with the question.

    Returns:
        `questions`, `resumed` (answered by an earlier start) and `unanswered` (turns with an empty answer: the question
        does not fit into the model's window, or the model returned nothing).

    Raises:
        DataError: no question at all could be answered.
    """
    answered = path.with_name(path.name + ".answered")
    kept = dict(_kept_rows(answered, {_digest(question) for question in questions}))
    resumed = len(kept)
    refusal: DataError | None = None
    generator = load() if resumed < len(questions) else None
    for question in questions:
        digest = _digest(question)
        if digest in kept:
            continue
        assert generator is not None
        turns, missed = _turns(question, answers, generator, seed)
        refusal = refusal or missed
        kept[digest] = {"question": digest, "turns": turns, "time": time.time()}
        _append(answered, kept[digest])
        progress(len(kept))
    unanswered = sum(not turn for row in kept.values() for turn in row["turns"])
    if refusal is not None and unanswered == sum(len(row["turns"]) for row in kept.values()):
        answered.unlink()
        raise refusal
    if unanswered:
        why = "the model returned no text" if refusal is None else refusal.what
        logger.warning("%s: %d turns have an empty answer (%s)", path.name, unanswered, why)
    rows = [(question, kept[_digest(question)]) for question in questions]
    write_whole(path, _alpaca_eval(rows, name) if answers.format == "alpaca_eval" else _fastchat(rows, name))
    return {"questions": len(questions), "resumed": resumed, "unanswered": unanswered}


def temperature(question: Mapping[str, Any], answers: Answers) -> float:
    """The temperature that the judge's own script uses: by the question's category in MT-Bench, 0 for AlpacaEval."""
    if answers.format == "alpaca_eval":
        return 0.0
    if "required_temperature" in question:  # FastChat's own field for a single question
        return float(question["required_temperature"])
    return TEMPERATURES.get(str(question.get("category")), OTHER_TEMPERATURE)


def _turns(
    question: Mapping[str, Any], answers: Answers, generator: Replies, seed: int
) -> tuple[list[str], DataError | None]:
    asked = [_instruction(question)] if answers.format == "alpaca_eval" else question["turns"]
    own_seed = _number(f"{seed} {_key(question, answers.format)}") % 2**31  # independent of the questions before it
    messages: list[dict[str, str]] = []
    turns, refusal = [], None
    for index, turn in enumerate(asked):
        messages.append({"role": "user", "content": turn})
        try:
            reply = generator.reply(
                list(messages),
                max_new_tokens=answers.max_new_tokens,
                temperature=temperature(question, answers),
                seed=own_seed + index,
            ).strip()
        except DataError as error:  # it does not fit into the window, but the judge still expects an answer
            reply, refusal = "", error
        turns.append(reply)
        messages.append({"role": "assistant", "content": reply})
    return turns, refusal


def _fastchat(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], name: str) -> str:
    """The content of FastChat's `data/mt_bench/model_answer/MODEL.jsonl`."""
    lines = [
        {
            "question_id": question["question_id"],
            "answer_id": _identifier(f"{name} {row['question']} {row['turns']}"),
            "model_id": name,
            "choices": [{"index": 0, "turns": row["turns"]}],
            "tstamp": row["time"],
        }
        for question, row in rows
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _alpaca_eval(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], name: str) -> str:
    """The content of the file for `alpaca_eval --model_outputs`."""
    lines = [
        {
            "instruction": question["instruction"],
            **({"input": question["input"]} if question.get("input") else {}),
            "output": row["turns"][0],
            "generator": name,
            "dataset": question.get("dataset", "alpaca_eval"),
        }
        for question, row in rows
    ]
    return json.dumps(lines, ensure_ascii=False, indent=2) + "\n"


def _is_instruction(row: Mapping[str, Any]) -> bool:
    return _is_text(row.get("instruction")) and (not row.get("input") or _is_text(row["input"]))


def _is_conversation(row: Mapping[str, Any]) -> bool:
    turns, asked = row.get("turns"), row.get("required_temperature", 0.0)
    is_warmth = isinstance(asked, int | float) and not isinstance(asked, bool) and 0 <= asked < math.inf
    return "question_id" in row and isinstance(turns, list) and bool(turns) and all(map(_is_text, turns)) and is_warmth


def _is_text(value: Any) -> bool:
    """Whether `value` is a non-blank string that UTF-8 can encode: JSON may hold lone surrogates, which it cannot."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def _instruction(row: Mapping[str, Any]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])


def _key(question: Mapping[str, Any], format: str) -> str:
    return _identifier(_instruction(question)) if format == "alpaca_eval" else str(question["question_id"])


def _digest(question: Mapping[str, Any]) -> str:
    """Hash of the whole question, so that an answer to a different wording is not reused."""
    return _identifier(json.dumps(question, sort_keys=True))


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16)


def _identifier(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:22]


def _lines(text: str) -> list[str]:
    """The non-blank lines. `splitlines` would also split at characters that JSON strings may hold (U+2028, say)."""
    return [line for line in text.split("\n") if line.strip()]


def _kept_rows(answered: Path, wanted: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not answered.is_file():
        return
    for line in _lines(answered.read_text(encoding="utf-8", errors="replace")):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # truncated when that run was killed; the question is answered again
            continue
        if isinstance(row, dict) and row.get("question") in wanted:
            yield row["question"], row


def _append(answered: Path, row: Mapping[str, Any]) -> None:
    torn = answered.is_file() and answered.stat().st_size and not answered.read_bytes().endswith(b"\n")
    with answered.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
