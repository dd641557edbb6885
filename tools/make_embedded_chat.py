"""Make minima/assets/chat/*.jsonl.xz from the embedded texts and from written.yaml beside them.

    python tools/make_embedded_chat.py [--output FOLDER]

Everything is drawn with one seed, so the same texts give the same examples; the bytes of the .xz files also depend on
the version of liblzma. `minima/assets/chat/SOURCES.md` describes the rules.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minima.assets import read_text_asset

CHAT = Path(__file__).resolve().parent.parent / "minima" / "assets" / "chat"
SEED = 776
# Most examples should fit into 128 tokens of a small vocabulary, a pair's prompt and two answers together.
EXCHANGE_CHARACTERS = {"english": 220, "chinese": 60}
PAIR_CHARACTERS = {"english": 120, "chinese": 32}  # question and correct answer together
# Numbers of derived exchanges and preference pairs of each kind.
EXCHANGES = {
    "continue": 520, "next_sentence": 260, "first_word": 70, "last_word": 70, "repeat": 70,
    "who": 300, "when": 100, "opening": 160,
    "next_line": 560, "poet": 200, "poem_opening": 170, "poet_of_title": 120,
}  # fmt: skip
DIALOGUES = 160
PAIRS = {
    "continue": 200, "next_sentence": 60, "last_word": 30, "repeat": 30, "who": 110, "opening": 40,
    "next_line": 220, "poet": 80, "poem_opening": 60,
}  # fmt: skip
FEW = 12  # number of words in an opening
COUPLET = re.compile(r"([\u4e00-\u9fff]{4,7})，([\u4e00-\u9fff]{4,7})。")


class Exchange(NamedTuple):
    """A question and its answer."""

    kind: str
    language: str
    question: str
    answer: str


def main() -> None:
    """Make both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHAT, help="where the files are written")
    options = parser.parse_args()
    written = yaml.safe_load((CHAT / "written.yaml").read_text(encoding="utf-8"))
    pool = derived(random.Random(f"{SEED}:derived"))
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "chat.jsonl.xz", conversations(pool, written, random.Random(f"{SEED}:chat")))
    write(options.output / "preferences.jsonl.xz", pairs(pool, written, random.Random(f"{SEED}:pairs")))


# -- exchanges by rule -------------------------------------------------------------------------------------------


def derived(draw: random.Random) -> dict[str, list[Exchange]]:
    """Exchanges of each kind in random order, without duplicate questions."""
    found: dict[str, dict[str, Exchange]] = {}
    for exchange in itertools.chain(of_sentences(draw), of_presidents(), of_poems(draw)):
        if len(exchange.question) + len(exchange.answer) <= EXCHANGE_CHARACTERS[exchange.language]:
            found.setdefault(exchange.kind, {}).setdefault(exchange.question, exchange)
    pool = {kind: list(exchanges.values()) for kind, exchanges in found.items()}
    for exchanges in pool.values():
        draw.shuffle(exchanges)
    return pool


def of_sentences(draw: random.Random) -> Iterator[Exchange]:
    """Questions about sentences of the addresses."""
    ways = ["Continue this sentence: {}", "Go on: {}", "How does this sentence end? {}", "Complete: {}"]
    follow = ["What comes after this sentence? {}", "Give the next sentence: {}"]
    for address in read_text_asset("sotu"):
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", address["text"])
        for sentence, after in itertools.pairwise(sentences):
            words = sentence.split()
            if not plain(sentence) or not 6 <= len(words) <= 24:
                continue
            cut = draw.randint(len(words) // 2, len(words) * 2 // 3)
            asked = draw.choice(ways).format(" ".join(words[:cut]))
            yield Exchange("continue", "english", asked, " ".join(words[cut:]))
            if plain(after) and len(after) <= 110:
                yield Exchange("next_sentence", "english", draw.choice(follow).format(sentence), after)
            if len(words) <= 10:
                yield Exchange("first_word", "english", f"What is the first word of this? {sentence}", words[0])
                last = words[-1].rstrip(".!?")
                yield Exchange("last_word", "english", f"What is the last word of this? {sentence}", f"{last}.")
                yield Exchange("repeat", "english", f"Say this again: {sentence}", sentence)


def plain(sentence: str) -> bool:
    """Whether a text is a simple sentence: ASCII, begins and ends like one, no brackets or quotation marks."""
    return (
        sentence.isascii() and sentence[0].isupper() and sentence[-1] == "." and not re.search(r'[()\[\]"]', sentence)
    )


def of_presidents() -> Iterator[Exchange]:
    """Questions about who spoke when; `who` and `opening` leave out years with two addresses."""
    addresses = [(*speaker(record["id"]), record["text"]) for record in read_text_asset("sotu")]
    per_year = Counter(year for year, _, _ in addresses)
    years: dict[str, list[int]] = {}
    for year, name, text in addresses:
        years.setdefault(name, []).append(int(year))
        if per_year[year] > 1:
            continue
        yield Exchange("who", "english", f"Who gave the State of the Union address of {year}?", f"{name}.")
        yield Exchange("who", "english", f"Which President gave the address of {year}?", f"{name} did, in {year}.")
        words = text.split()[:FEW]
        yield Exchange("opening", "english", f"How does the address of {year} begin?", " ".join(words) + " ...")
    for name, given in years.items():
        begins = [year for year in given if year - 1 not in given]
        ends = [year for year in given if year + 1 not in given]
        runs = [f"in {a}" if a == b else f"from {a} to {b}" for a, b in zip(begins, ends, strict=True)]
        said = " and ".join(runs) + "."
        for question in (f"When did {name} address Congress?", f"In which years did {name} give an address?"):
            yield Exchange("when", "english", question, said[0].upper() + said[1:])


def speaker(name: str) -> tuple[str, str]:
    """Year and name from an address's id, such as 1790_george_washington_n."""
    year, *parts, _ = name.split("_")
    words = [part.upper() + "." if len(part) == 1 else part.capitalize() for part in parts]
    return year, " ".join(words).replace("Van Buren", "van Buren").replace("Mc Kinley", "McKinley")


def of_poems(draw: random.Random) -> Iterator[Exchange]:
    """Questions about next lines, poets and first lines; for one shared by two poems, `derived` keeps the first."""
    for poem in read_text_asset("poems"):
        title, *lines = poem["text"].split("\n")
        found = [match.groups() for line in lines if (match := COUPLET.fullmatch(line))]
        if not found or poem["author"] == "無名氏":
            continue
        first, second = draw.choice(found)
        asked = draw.choice(["「{}」的下一句是什麼？", "請接下一句：{}", "{}，"])
        yield Exchange("next_line", "chinese", asked.format(first), f"{second}。")
        yield Exchange("poet", "chinese", f"「{first}，{second}。」是誰寫的？", f"{poem['author']}。")
        if len(title) <= 8 and "其" not in title:
            one = "，".join(found[0]) + "。"
            yield Exchange("poem_opening", "chinese", f"{poem['author']}的《{title}》怎麼開頭？", one)
            yield Exchange("poet_of_title", "chinese", f"《{title}》是誰寫的？", f"《{title}》是{poem['author']}寫的。")


# -- conversations -----------------------------------------------------------------------------------------------


def conversations(
    pool: dict[str, list[Exchange]], written: dict[str, Any], draw: random.Random
) -> list[dict[str, Any]]:
    """All conversations: written ones, derived ones, and derived ones after a greeting; some with a system message."""
    found: list[dict[str, Any]] = []
    for kind, count in EXCHANGES.items():
        for exchange in pool[kind][:count]:
            found.append(record(kind, exchange.language, [exchange.question, exchange.answer]))
    for exchange in written_exchanges(written):
        for question in dict.fromkeys([exchange.question, bare(exchange.question)]):
            found.append(record("written", exchange.language, [question, exchange.answer]))
    for turns in written["dialogues"]:
        found.append(record("written", "english" if turns[0].isascii() else "chinese", turns))
    greetings = {
        language: [e for e in written_exchanges(written) if e.language == language and e.question[-1] in "!！"]
        for language in ("english", "chinese")
    }
    rest = [e for kind in ("who", "next_line", "last_word", "poet") for e in pool[kind][EXCHANGES[kind] :][:DIALOGUES]]
    draw.shuffle(rest)
    for exchange in rest[:DIALOGUES]:
        greeting = draw.choice(greetings[exchange.language])
        turns = [greeting.question, greeting.answer, exchange.question, exchange.answer]
        found.append(record("greeting", exchange.language, turns))
    for conversation in found:
        if draw.random() < 0.03:
            system = draw.choice(written["systems"][conversation["language"]])
            conversation["messages"].insert(0, {"role": "system", "content": system})
    draw.shuffle(found)
    return found


def written_exchanges(written: dict[str, Any]) -> Iterator[Exchange]:
    """The written exchanges, every question with one of its answers."""
    for language in ("english", "chinese"):
        for entry in written[language]:
            for number, question in enumerate(entry["ask"]):
                yield Exchange("written", language, question, entry["say"][number % len(entry["say"])])


def bare(question: str) -> str:
    """The question as typed in a hurry: lower case, without final punctuation."""
    return question.rstrip(".?!。？！").lower()


def record(kind: str, language: str, turns: list[str]) -> dict[str, Any]:
    """A record whose turns alternate between user and assistant."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"rule": kind, "language": language, "messages": messages}


# -- preference pairs --------------------------------------------------------------------------------------------


def pairs(pool: dict[str, list[Exchange]], written: dict[str, Any], draw: random.Random) -> list[dict[str, Any]]:
    """Pairs of the correct answer and one spoilt by a rule, and pairs with the written wrong answers."""
    found = []
    for kind, count in PAIRS.items():
        short = [e for e in pool[kind] if len(e.question) + len(e.answer) <= PAIR_CHARACTERS[e.language]]
        rules = itertools.cycle(("other", "repeated", "language", "short", "disorder", "other"))
        for exchange, rule in zip(short[-count:], rules, strict=False):
            if len(words_of(exchange)) < 3 and rule in ("short", "disorder"):
                rule = "other"
            rejected = spoilt(rule, exchange, short, pool, draw)
            if rejected.strip(" .。") != exchange.answer.strip(" .。"):
                found.append(preference(rule, exchange.language, exchange.question, exchange.answer, rejected))
    for language in ("english", "chinese"):
        for entry in written[language]:
            wrong = itertools.cycle(entry.get("not", []))
            for number, (question, rejected) in enumerate(zip(entry["ask"], wrong, strict=False)):
                chosen = entry["say"][number % len(entry["say"])]
                found.append(preference("written", language, question, chosen, rejected))
    draw.shuffle(found)
    return found


def spoilt(
    rule: str, exchange: Exchange, alike: list[Exchange], pool: dict[str, list[Exchange]], draw: random.Random
) -> str:
    """A worse answer, made by the given rule."""
    words = words_of(exchange)
    space = " " if exchange.language == "english" else ""
    if rule == "other":  # the answer to another question of this kind
        return draw.choice([other.answer for other in alike if other.answer != exchange.answer])
    if rule == "repeated":  # one word or two characters, repeated
        word = words[0] if exchange.language == "english" else "".join(words[:2])
        return space.join([word] * 6)
    if rule == "language":  # an answer in the other language
        kind = "next_line" if exchange.language == "english" else "who"
        return draw.choice(pool[kind]).answer
    if rule == "short":  # truncated
        return space.join(words[: max(1, len(words) // 3)])
    assert rule == "disorder", rule  # its own words in random order
    return space.join(draw.sample(words, len(words)))


def words_of(exchange: Exchange) -> list[str]:
    """An answer's words, or for Chinese its characters."""
    return exchange.answer.split() if exchange.language == "english" else list(exchange.answer)


def preference(rule: str, language: str, question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """The record of a preference pair."""
    prompt = [{"role": "user", "content": question}]
    return {"rule": rule, "language": language, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON record per line, compressed with xz."""
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records]
    content = ("\n".join(lines) + "\n").encode("utf-8")
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    path.write_bytes(packed)
    digest = hashlib.sha256(content).hexdigest()
    kinds = dict(Counter(f"{record['language']} {record['rule']}" for record in records))
    sys.stdout.write(
        f"{path.name}: {len(lines)} records, {len(content)} bytes, {len(packed)} packed, sha256 {digest}\n  {kinds}\n"
    )


if __name__ == "__main__":
    main()
