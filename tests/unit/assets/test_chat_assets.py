"""The embedded conversations, pairs and template: what the tool makes, small enough, with their sources."""

import json
import lzma
import subprocess
import sys
from importlib import resources

import pytest

from minima.assets import CHATS, read_chat_asset, read_template


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    subprocess.run([sys.executable, root / "tools" / "make_embedded_chat.py", "--output", folder], check=True)
    return folder


@pytest.mark.parametrize("name", CHATS)
def test_the_tool_makes_what_is_shipped(made, name):
    with lzma.open(made / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == list(read_chat_asset(name))


def test_small_and_with_sources():
    folder = resources.files("minima.assets") / "chat"
    sizes = {file.name: len(file.read_bytes()) for file in folder.iterdir()}
    assert sum(sizes.values()) < 300_000
    sources = (folder / "SOURCES.md").read_text(encoding="utf-8")
    for name in CHATS:
        assert f"{name}.jsonl.xz" in sources
        assert f"{len(list(read_chat_asset(name))):,}" in sources
        assert {f"`{record['rule']}`" for record in read_chat_asset(name)} <= {
            f"`{word}`" for word in sources.split("`")[1::2]
        }


def test_rules_give_what_they_say():
    chat = list(read_chat_asset("chat"))
    asked = {m[-2]["content"]: m[-1]["content"] for m in (record["messages"] for record in chat)}
    assert asked["Who are you?"].startswith("I am MiniChat")
    assert asked["When did Abraham Lincoln address Congress?"] == "From 1861 to 1864."
    assert asked["In which years did Grover Cleveland give an address?"] == "From 1885 to 1888 and from 1893 to 1896."
    assert not any("1953?" in question or "1961?" in question for question in asked)  # two addresses each
    for record in read_chat_asset("preferences"):
        assert record["chosen"] != record["rejected"]
        if record["rule"] == "language":
            assert record["chosen"].isascii() != record["rejected"].isascii()
        if record["rule"] == "short":
            assert record["chosen"].startswith(record["rejected"])
        if record["rule"] == "disorder" and record["language"] == "chinese":
            assert sorted(record["chosen"]) == sorted(record["rejected"])


def test_the_template_is_readable():
    assert "[|Assistant|]" in read_template("minichat")
