"""A study as Slurm arrays, with the scripts as they would be submitted."""

from pathlib import Path

import pytest

from minima.errors import ClusterError
from minima.law.study.grid import CELLS
from minima.law.study.jobs import submit
from minima.law.study.running import study as run_study
from tests.unit.law.study_grid import TRAINING, finish, study_file, study_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text("partition: gpu\nstages: {cells: {gpus_per_node: 1, time: 60}}\n")
    return tmp_path


def sent(here: Path, **changes) -> str:
    study, units = study_of(here, **changes)
    said: list[str] = []
    assert submit(study, units, Path("cluster.yaml"), True, said.append) == 0
    return "\n".join(said)


def test_one_array_for_each_level_after_the_one_before_it(here):
    text = sent(here)
    commands = [line for line in text.splitlines() if line.startswith("# ==> sbatch")]
    assert [line.split("/")[-1] for line in commands] == ["data.sbatch", "teachers.sbatch", "cells.sbatch"]
    assert "--dependency=afterok:ID_OF_tiny.data" in commands[1]
    assert "--dependency=afterok:ID_OF_tiny.teachers" in commands[2]
    assert "#SBATCH --array=0-0\n" in text and "#SBATCH --array=0-5\n" in text  # 4 teachers in one task, 22 cells in 6
    assert not (here / "runs").exists()


def test_every_run_is_in_one_task(here):
    text = sent(here)
    _, units = study_of(here)
    for unit in units:
        assert text.count(unit.name + ",") + text.count(unit.name + "\n") == 1
    assert "law study" in text and "--runs" in text and "run_alone" in text


def test_what_is_finished_is_not_submitted(here):
    units = study_of(here)[1]
    for unit in units:
        if unit.level != CELLS:
            finish(unit)
    text = sent(here)
    assert "teachers.sbatch" not in text and "cells.sbatch" in text
    for unit in units:
        finish(unit)
    assert "every run is finished" in sent(here)


def test_several_ranks_are_refused(here):
    Path("cluster.yaml").write_text("stages: {cells: {ranks_per_node: 2}}\n")
    with pytest.raises(ClusterError, match="asks for 2 ranks"):
        sent(here)


def test_through_the_study_s_own_command(here, monkeypatch):
    monkeypatch.setattr("minima.stages.driver.checks.num_accelerators", lambda: 0)  # on the login node
    path = study_file(here, output=str(here / "runs"), student_training=TRAINING | {"kernels": "liger"})
    said: list[str] = []
    assert run_study(path, [], said.append, dry_run=True, cluster=Path("cluster.yaml")) == 0
    assert "cells.sbatch" in "\n".join(said)
