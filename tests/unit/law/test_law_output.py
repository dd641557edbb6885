"""What `minima law fit` and `plot` refuse before they compute anything, and where a figure goes."""

import pytest

from minima import cli
from minima.law.fit import fitting
from minima.law.fit.fitting import fit_table, write_fit
from minima.law.table import write_table
from tests.law_tables import valley


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a table and its fit."""
    folder = tmp_path_factory.mktemp("law")
    rows = valley((100e6, 200e6), [150e6 * 2**step for step in range(4)], 2, lambda size: 3 * size, noise=0.001)
    write_table(rows, folder / "table.csv", folder / "table.parquet")
    write_fit(fit_table(folder / "table.csv", num_draws=10, descents=1), folder / "table.fit.json")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "table.csv", "--seed", "-1"], "--seed -1"),
        (["plot", "table.csv", "--seed", "-1"], "--seed -1"),
        (
            ["fit", "table.csv", "--output", "nodir/x.json"],
            "the output nodir/x.json lies in nodir, which is not a folder",
        ),
        (["fit", "table.csv", "--output", "."], "the output . is a folder"),
        (["fit", "table.csv", "--output", "folder"], "the output folder is a folder"),
        (["plot", "table.fit.json", "--output", "nodir/x"], "nodir/x.png lies in nodir, which is not a folder"),
        (["plot", "table.fit.json", "--output", "."], "the output . is a folder"),
        (["plot", "table.fit.json", "--output", "taken"], "the output taken.svg is a folder"),
    ],
)
def test_what_could_not_be_written_is_refused_first(place, monkeypatch, capsys, arguments, message):
    def computed(*given):
        raise AssertionError("refused before")

    monkeypatch.chdir(place)
    monkeypatch.setattr(fitting, "fit_table", computed)
    (place / "folder").mkdir(exist_ok=True)
    (place / "taken.svg").mkdir(exist_ok=True)
    before = sorted(path.name for path in place.iterdir())
    assert cli.main(["law", *arguments]) == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert message in shown and "what to do: " in shown
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize("name", ["figure.png", "figure.SVG", "figure"])
def test_a_figure_has_one_ending(place, monkeypatch, tmp_path, name):
    monkeypatch.chdir(place)
    assert cli.main(["law", "plot", "table.fit.json", "--output", str(tmp_path / name)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "figure.svg"]
