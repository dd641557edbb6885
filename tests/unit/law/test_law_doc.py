"""docs/law.md shows what the command prints, and names every column."""

from minima import cli
from minima.law.table import COLUMNS


def test_the_example_is_what_is_printed(root, capsys):
    text = (root / "docs" / "law.md").read_text(encoding="utf-8")
    assert cli.main(["law", "recommend", "--student", "2.7B", "--tokens", "126B", "--teachers", "7B,13B,70B"]) == 0
    assert capsys.readouterr().out.strip() in text


def test_every_column_is_explained(root):
    text = (root / "docs" / "law.md").read_text(encoding="utf-8")
    assert not [name for name in COLUMNS if f"`{name}`" not in text]
