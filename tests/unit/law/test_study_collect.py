"""The table and the overview of a study, from manifests."""

import math

import pytest

from minima.law.study.collect import CSV, PARQUET, collect, overview
from minima.law.study.recipe import load_study
from minima.law.study.running import study as run_study
from minima.law.study.worker_pool import Tally
from minima.law.table import read_table
from tests.unit.law.study_grid import finish, study_file, study_of


@pytest.fixture
def place(tmp_path):
    study, units = study_of(tmp_path)
    return study, units, {unit.name: unit for unit in units}


def finished(by_name, *names):
    for name in ("data/corpus", "teachers/small-seed1", *names):
        finish(by_name[name], loss=2.5 if name.startswith("teachers") else 3.0)


def test_a_row_says_what_its_cell_was(place):
    study, units, by_name = place
    name = "cells/a-small-pruned_from_teacher-163840-seed1"
    finished(by_name, name)
    collect(study, units)
    for file in (CSV, PARQUET):
        (row,) = read_table(study.folder / file)
        shape, teacher = study.shape_of("a"), study.shape_of("small")
        assert (row.student, row.teacher, row.initialisation, row.seed) == ("a", "small", "pruned_from_teacher", 1)
        assert row.student_parameters == shape.parameters
        assert row.student_non_embedding_parameters == shape.non_embedding_parameters
        assert row.teacher_non_embedding_parameters == teacher.non_embedding_parameters
        assert (row.student_loss, row.student_bits_per_byte, row.teacher_loss, row.kl) == (3.0, 1.5, 2.5, 0.25)
        assert (row.tokens, row.unique_tokens, row.epochs) == (81_920, 81_920, 1.0)
        assert row.flops == 81_920 * (shape.training_flops_per_token(32) + teacher.forward_flops_per_token(32))
        assert row.teacher_flops == 81_920 * teacher.training_flops_per_token(32)
        assert row.seconds == 7.5 and row.vocabulary_size == 512
        assert row.family == "llama, corpus identity-of-", "losses on another corpus are not compared with its own"


def test_a_cell_has_the_teacher_of_its_seed(place):
    study, units, by_name = place
    finished(by_name, "teachers/small-seed2", "cells/a-small-random-163840-seed2")
    finish(by_name["teachers/small-seed1"], loss=2.9)
    (row,) = collect(study, units)
    assert (row.seed, row.teacher_loss) == (2, 2.5)


def test_tokens_that_come_again_are_not_unique(place):
    study, units, by_name = place
    finished(by_name, "cells/a-direct-163840-seed1")
    path = by_name["cells/a-direct-163840-seed1"].folder / "student" / "manifest.json"
    path.write_text(path.read_text().replace("81920", "163840"))
    (row,) = collect(study, units)
    assert row.unique_tokens == 100_000 and math.isclose(row.epochs, 1.6384)


def test_the_line_to_beat_has_no_teacher(place):
    study, units, by_name = place
    finished(by_name, "cells/a-direct-163840-seed1")
    (row,) = collect(study, units)
    assert row.teacher == "" and row.teacher_parameters is None and row.teacher_loss is None and row.kl is None


def test_a_half_finished_cell_is_no_row(place):
    study, units, by_name = place
    name = "cells/a-direct-163840-seed1"
    finished(by_name, name)
    (by_name[name].folder / "quality" / "manifest.json").unlink()
    assert collect(study, units) == [] and not (study.folder / CSV).exists()


def test_the_overview_tells_done_running_and_left(place):
    study, units, by_name = place
    finished(by_name, "cells/a-direct-163840-seed1")
    names = {name for name in by_name if by_name[name].is_done()}
    tally = Tally(done=names, running={"cells/a-direct-163840-seed2"}, failed={"teachers/large-seed2": "no disk"})
    text = overview(study, units, tally)
    assert f"3 runs done, 1 running, {len(units) - 5} left, 1 failed" in text
    assert "3.0000 (1/2)*" in text and "failed: teachers/large-seed2: no disk" in text
    own = next(line for line in text.splitlines() if line.startswith("(teachers' own)"))
    assert "2.5000 (1/2)" in own


def test_collecting_runs_nothing(tmp_path):
    path = study_file(tmp_path, output=str(tmp_path / "runs"))
    said: list[str] = []
    assert run_study(path, [], said.append, collect_only=True) == 0
    assert "none of 22 cells is finished yet" in said[-1]


def test_a_dry_run_shows_the_grid_and_writes_nothing(tmp_path):
    path = study_file(tmp_path, output=str(tmp_path / "runs"))
    said: list[str] = []
    assert run_study(path, [], said.append, dry_run=True) == 0
    assert "16,032" in said[-1] and "cells" in said[-1] and not (tmp_path / "runs").exists()


def test_a_dry_run_divides_each_models_own_tokens(tmp_path):
    said: list[str] = []
    path = study_file(tmp_path, output=str(tmp_path / "runs"))
    assert run_study(path, ["teacher_training.steps=50"], said.append, dry_run=True) == 0
    study = load_study(path, ["teacher_training.steps=50"])
    trained = 50 * study.teacher_training["batch_sequences"] * study.corpus["sequence_length"]
    line = next(line for line in said[-1].splitlines() if line.startswith("teacher"))
    name = line.split()[1]
    assert line.endswith(f" {trained / study.shape_of(name).non_embedding_parameters:.1f}")


def test_a_finished_run_of_another_grid_is_refused(tmp_path, place):
    finished(place[2])
    path = tmp_path / "tiny.yaml"
    with pytest.raises(ValueError, match=r"contains files, but no recipe.yaml|is finished in"):
        run_study(path, [], lambda text: None, dry_run=True)


def test_the_folder_of_another_study_is_refused(tmp_path):
    path = study_file(tmp_path, output=str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "study.yaml").write_text("name: other\n")
    with pytest.raises(ValueError, match="folder of another study \\('other'"):
        run_study(path, [], lambda text: None)
