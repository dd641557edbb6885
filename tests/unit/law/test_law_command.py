"""`minima law fit`, `recommend` and `plot` as commands."""

import hashlib
import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from minima import cli
from minima.errors import TableError
from minima.law.fit.fitting import fit_table, read_fit
from minima.law.table import write_table
from tests.law_tables import valley

STUDENTS, TEACHERS = (100e6, 200e6, 400e6), [150e6 * 2**step for step in range(6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a table, a row of which cannot be fitted, and its fit."""
    folder = tmp_path_factory.mktemp("law")
    rows = valley(STUDENTS, TEACHERS, 3, lambda size: 3 * size, noise=0.001, direct=True)
    rows += valley(
        STUDENTS, TEACHERS, 3, lambda size: 90 * size, noise=0.001, initialisation="random", teacher_loss=None
    )
    rows[4] = type(rows[4])(**(vars(rows[4]) | {"student_loss": float("nan")}))
    write_table(rows, folder / "table.csv", folder / "table.parquet")
    assert cli.main(["law", "fit", str(folder / "table.csv")]) == 0
    return folder


def test_fit_reports_and_keeps_what_it_found(place, capsys):
    assert cli.main(["law", "fit", str(place / "table.parquet"), "--output", str(place / "other.json")]) == 0
    shown = capsys.readouterr().out
    assert "left out: row 5 (student s100M, teacher t2400M, pruned_from_teacher" in shown
    assert "student_loss is nan" in shown
    assert "no run with teacher t2400M for seed 0" in shown
    assert "T* = a S + b: a = " in shown
    assert "the paper's T* = 2.498 S - 11.498: rejected" in shown
    assert "45 runs have no teacher_loss" in shown
    assert "no line: 0 bracketed students, but a line needs three" in shown
    first, second = read_fit(place / "table.fit.json"), read_fit(place / "other.json")
    assert (first.conditions, first.scaling) == (second.conditions, second.scaling)


def test_the_same_seed_gives_the_same_fit_and_another_does_not(place):
    kept = read_fit(place / "table.fit.json")
    again = fit_table(place / "table.csv")
    other = fit_table(place / "table.csv", seed=1, descents=1)
    assert again == kept
    assert kept.sha256 == hashlib.sha256((place / "table.csv").read_bytes()).hexdigest()
    assert other.conditions[0].line.draws != kept.conditions[0].line.draws
    assert other.conditions[0].line.with_intercept.slope == kept.conditions[0].line.with_intercept.slope


def test_sizes_with_embeddings_are_other_sizes(place):
    fit = fit_table(place / "table.csv", sizes="all", descents=1)
    assert fit.conditions[0].minima[0].student_size == 101_000_000
    assert any("sizes without embeddings, but these include them" in note for note in fit.notes)


def test_json_is_json(place, capsys):
    assert cli.main(["law", "fit", str(place / "table.csv"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["conditions"][0]["minima"][0]["status"] == "minimum"
    assert shown["excluded"][0]["row"] == 5
    given = ["--student", "300M", "--tokens", "1e9", "--fit", str(place / "table.fit.json"), "--json"]
    assert cli.main(["law", "recommend", *given]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["question"]["student"] == 300e6
    assert len(shown["answers"]) == 6
    assert shown["answers"][-1]["teacher"] is None


@pytest.fixture(scope="module")
def drawn(place):
    """The figure of the fit, and what it was written to."""
    from matplotlib.figure import Figure

    from minima.law import plot

    seen = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        seen.append(figure)
        return save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        paths = plot.plot_fit(read_fit(place / "table.fit.json"), place / "table")
    return seen[0], paths


def test_plot_draws_a_table_as_its_fit(place, drawn, capsys):
    assert cli.main(["law", "plot", str(place / "table.csv"), "--output", str(place / "again")]) == 0
    png, svg = drawn[1]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.fromstring(svg.read_bytes()).tag.endswith("svg")
    assert (place / "again.svg").read_bytes() == svg.read_bytes()
    assert str(place / "again.png") in capsys.readouterr().out


def test_plot_shows_every_student_and_start(drawn):
    """What the picture says, by what is drawn in its panels."""
    loss_pruned, loss_random, law, *_, legend = drawn[0].axes
    assert loss_pruned.get_title() == "pruned from its teacher"
    assert loss_random.get_title() == "random start"
    assert loss_pruned.get_xscale() == law.get_yscale() == "log"
    assert loss_pruned.get_ylim() == loss_random.get_ylim()
    assert {text.get_text() for text in loss_pruned.texts} == {"100M", "200M", "400M"}
    stars = [line for line in loss_pruned.lines if line.get_marker() == "*"]
    assert [float(line.get_xdata()[0]) for line in stars] == pytest.approx([300e6, 600e6, 1200e6], rel=0.05)
    labels = [text.get_text() for text in legend.get_legend().get_texts()]
    assert "random start: no line" in labels
    assert "the paper: 2.498 S - 11.5" in labels
    shapes = {(line.get_color(), line.get_marker()) for line in loss_pruned.lines if line.get_markersize() == 4.5}
    assert len({marker for _, marker in shapes if marker != "None"}) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nothing.csv"], "nothing.csv cannot be read"),
        (["plot", "nothing.fit.json"], "cannot be read as a fit"),
        (["recommend", "--student", "2.7e9", "--fit", "nothing.json"], "cannot be read as a fit"),
        (["recommend", "--student", "many"], "--student 'many' is not a positive number"),
        (["recommend", "--student", "2e9", "--teachers", "1e9,7e9"], "a teacher of 1.00B for a student of 2.00B"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert cli.main(["law", *arguments]) == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert message in shown
    assert "what to do: " in shown


def test_another_json_is_no_fit(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(TableError, match="cannot be read as a fit"):
        read_fit(tmp_path / "a.json")


@pytest.mark.parametrize(("part", "package"), [("fit", "scipy"), ("plot", "matplotlib")])
def test_a_missing_package_is_named(part, package, monkeypatch, capsys):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else there(name))
    assert cli.main(["law", part, "x.csv"]) == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert f"{package} is not installed" in shown
    assert "pip install scipy matplotlib" in shown


def test_no_part_of_it_imports_torch(place):
    code = (
        "import sys\nfrom minima.cli import main\ntry:\n    main(['law', '--help'])\nexcept SystemExit:\n    pass\n"
        f"assert main(['law', 'fit', {str(place / 'table.csv')!r}, '--output', {str(place / 'fourth.json')!r}]) == 0\n"
        f"assert main(['law', 'plot', {str(place / 'fourth.json')!r}]) == 0\n"
        "assert main(['law', 'recommend', '--student', '1e9', '--tokens', '1e11']) == 0\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
