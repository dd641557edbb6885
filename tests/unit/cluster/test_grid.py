"""A grid: cells of a recipe as the tasks of one job array."""

import json
from pathlib import Path

import pytest
import yaml

from minima.cluster.grid import read_grid
from minima.cluster.jobs import read_jobs
from minima.cluster.submit import submit
from minima.errors import ClusterError, RecipeError
from tests.unit.cluster.conftest import finish
from tests.unit.cluster.test_scripts import scripts_in, shellcheck

RUN = Path("runs/test")


def write_grid(grid) -> Path:
    Path("grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return Path("grid.yaml")


def send(*overrides: str, dry_run: bool = False, names: list[str] | None = None) -> str:
    said: list[str] = []
    grid = Path("grid.yaml")
    assert submit(Path("recipe.yaml"), overrides, Path("cluster.yaml"), names, grid, dry_run, said.append) == 0
    return "\n".join(said)


def test_axes_are_all_combinations(project):
    grid = read_grid(write_grid({"axes": {"stages.base.seed": [1, 2], "stages.base.betas": [[0.9, 0.95]]}}))
    assert grid == {
        "seed=1,betas=_0.9_0.95_": ["stages.base.seed=1", "stages.base.betas=[0.9, 0.95]"],
        "seed=2,betas=_0.9_0.95_": ["stages.base.seed=2", "stages.base.betas=[0.9, 0.95]"],
    }


def test_axes_of_one_name_in_two_stages(project):
    grid = read_grid(write_grid({"axes": {"stages.base.seed": [1], "stages.corpus.seed": [2]}}))
    assert list(grid) == ["base.seed=1,corpus.seed=2"]


def test_cells_and_axes(project):
    cells = [{"name": "a", "overrides": ["stages.base.steps=2"]}, {"name": "b"}]
    grid = read_grid(write_grid({"cells": cells, "axes": {"stages.base.seed": [1, 2]}}))
    assert list(grid) == ["a,seed=1", "a,seed=2", "b,seed=1", "b,seed=2"]
    assert grid["a,seed=2"] == ["stages.base.steps=2", "stages.base.seed=2"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"cell": []}, "did you mean 'cells'"),
        ({}, "contains nothing"),
        ({"cells": []}, "has a cell None"),
        ({"cells": [{"name": "a"}, {"name": "a"}]}, "two cells called 'a'"),
        ({"cells": [{"name": "../a"}]}, "a cell called '../a'"),
        ({"cells": [{"name": "$(x)"}]}, "a cell called"),
        ({"cells": [{"name": "a", "override": []}]}, "a cell has a name and overrides"),
        ({"cells": [{"name": "a", "overrides": "x=1"}]}, "a list of strings"),
        ({"axes": {"stages.base.seed": []}}, "a key.path with a list of values"),
        ({"axes": {"stages.base.seed": 3}}, "a key.path with a list of values"),
    ],
)
def test_grids_that_are_refused(project, grid, message):
    with pytest.raises(ClusterError, match=message):
        read_grid(write_grid(grid))


def test_one_array_whose_tasks_run_a_cell_each(slurm, project):
    cluster = {"defaults": {"nodes": 4}, "stages": {"cells": {"nodes": 1, "ranks_per_node": 2, "array_limit": 1}}}
    Path("cluster.yaml").write_text(yaml.safe_dump(cluster))
    write_grid({"axes": {"stages.base.seed": [1, 2]}})
    text = send("stages.base.steps=9", dry_run=True)
    send("stages.base.steps=9")
    [script] = [(RUN / "cluster" / name) for name in scripts_in(text)]
    shellcheck(script.resolve())
    assert "#SBATCH --array=0-1%1\n" in script.read_text() and "#SBATCH --nodes=1\n" in script.read_text()
    assert [(job.role, job.cells) for job in read_jobs(RUN)] == [("cells", {"0": "seed=1", "1": "seed=2"})]
    job = slurm.job(script, SLURM_ARRAY_JOB_ID="101", SLURM_ARRAY_TASK_ID="1")
    job.communicate()
    calls = slurm.calls("srun")
    assert job.returncode == 0
    assert [call[call.index("--stages") + 1] for call in calls] == ["corpus", "base", "out", "out"]
    for call in calls:
        assert call[-3:] == ["stages.base.steps=9", "stages.base.seed=2", f'output="{RUN}/cells/seed=2"']
    assert ["--ntasks=1" in call for call in calls] == [True, False, False, True]
    assert f"--output={RUN}/cells/seed=2/logs/base-101_1-rank%t.log" in calls[1]


def test_a_cell_runs_the_stages_that_are_asked_for_and_no_other(slurm, project):
    write_grid({"cells": [{"name": "a"}]})
    send(names=["corpus"])
    job = slurm.job(RUN / "cluster" / "cells.sbatch", SLURM_ARRAY_JOB_ID="101", SLURM_ARRAY_TASK_ID="0")
    job.communicate()
    [call] = slurm.calls("srun")
    assert job.returncode == 0 and call[call.index("--stages") + 1] == "corpus"


def test_a_cell_whose_stage_fails_goes_no_further(slurm, project):
    write_grid({"cells": [{"name": "a"}]})
    send()
    slurm.answer(srun="exit 2")
    job = slurm.job(RUN / "cluster" / "cells.sbatch", SLURM_ARRAY_JOB_ID="101", SLURM_ARRAY_TASK_ID="0")
    job.communicate()
    assert job.returncode == 2 and len(slurm.calls("srun")) == 1


def test_submitted_again_the_cells_that_are_missing(slurm, project):
    write_grid({"cells": [{"name": "a"}, {"name": "b"}, {"name": "c"}]})
    send()
    slurm.answer(squeue="101|1|RUNNING|test.cells|None")
    finish(RUN / "cells" / "a", "corpus", "base", "out")
    said = send()
    assert "a: finished" in said and "b: in the queue" in said
    assert read_jobs(RUN)[-1].cells == {"0": "c"}


def test_a_change_for_a_cell_whose_job_is_in_the_queue_is_refused(slurm, project):
    write_grid({"cells": [{"name": "a"}, {"name": "b", "overrides": ["stages.base.steps=9"]}]})
    send()
    slurm.answer(squeue="101|0|RUNNING|test.cells|None\n101|1|PENDING|test.cells|Resources")
    assert "nothing to submit" in send()
    write_grid({"cells": [{"name": "a"}, {"name": "b", "overrides": ["stages.base.steps=8"]}]})
    with pytest.raises(ClusterError, match=r"b: job 101_1 is in the queue with stages\.base\.steps 9, not 8"):
        send()


def test_a_change_of_the_cluster_file_for_an_array_in_the_queue_is_told_once(slurm, project):
    write_grid({"cells": [{"name": "a"}, {"name": "b"}]})
    send()
    slurm.answer(squeue="101|0|RUNNING|test.cells|None\n101|1|PENDING|test.cells|Resources")
    finish(RUN / "cells" / "a", "corpus", "base", "out")
    assert "warning" not in send()
    Path("cluster.yaml").write_text(yaml.safe_dump({"time": "01:00:00", "stages": {"cells": {"memory": "9G"}}}))
    assert send().count('warning: job 101 keeps memory null, not "9G": it was submitted with that') == 1


def test_a_cell_whose_job_in_the_queue_runs_some_stages_alone(slurm, project):
    write_grid({"cells": [{"name": "a"}, {"name": "b"}]})
    send(names=["corpus"])
    slurm.answer(squeue="101|0|RUNNING|test.cells|None\n101|1|PENDING|test.cells|Resources")
    said = send()
    assert "a: in the queue for corpus only: submit again once it has ended, for base, out" in said
    assert "b: in the queue for corpus only" in said and "nothing to submit" in said
    assert "alone" not in send(names=["corpus"])
    finish(RUN / "cells" / "a", "base", "out")
    assert "a: in the queue\n" in send()


def test_a_cells_save_that_takes_longer_than_the_signals_lead_is_told(slurm, project):
    write_grid({"cells": [{"name": "a"}, {"name": "b"}]})
    marker = RUN / "cells/b/base/checkpoints/step-00000010/checkpoint.json"
    marker.parent.mkdir(parents=True)
    (RUN / "cells/b/recipe.yaml").write_text(Path("recipe.yaml").read_text())
    marker.write_text(json.dumps({"step": 10, "save_seconds": 900.0}))
    assert "warning: b: base: its last save took 900 s" in send()


def test_a_cell_that_cannot_be_is_refused_before_any_runs(slurm, project):
    write_grid({"cells": [{"name": "a"}, {"name": "b", "overrides": ["stages.bas.steps=2"]}]})
    with pytest.raises(RecipeError, match="did you mean 'base'"):
        send()
    assert not slurm.calls("sbatch")
