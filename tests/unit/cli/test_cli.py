"""The command: its arguments, its exit codes, and what it finds when it is installed without a clone."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minima import cli
from minima.errors import LostRank, StageError


def test_help_and_version_need_no_torch(tmp_path):
    code = "import sys\nfrom minima.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
    code += "    assert end.code == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run the stages of a recipe" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "names", "overrides"),
    [
        (["r", "--stages", "a,b", "x=1", "y=2"], ["a", "b"], ["x=1", "y=2"]),
        (["r", "x=1", "--stages", "a", "y=2"], ["a"], ["x=1", "y=2"]),
        (["r", "--ranks", "4", "x=1", "--launcher", "torchrun"], None, ["x=1", "ranks=4", "launcher=torchrun"]),
    ],
)
def test_run_takes_options_and_overrides_in_any_order(monkeypatch, tmp_path, arguments, names, overrides):
    seen = []
    monkeypatch.setattr("minima.stages.shipped.find_recipe", Path)
    monkeypatch.setattr("minima.stages.driver.pipeline.run", lambda *given: seen.append(given) or 5)
    assert cli.main(["run", *arguments]) == 5
    assert seen[0][:3] == (Path("r"), overrides, names)


@pytest.mark.parametrize(
    "arguments",
    [["r", "a,b", "x=1"], ["r", "x=1", "a", "b"], ["r", "--stages", "a,b", "x=1"], ["r", "--stages", "a", "b", "x=1"]],
)
def test_stage_takes_names_and_overrides(monkeypatch, arguments):
    seen = []
    monkeypatch.setattr("minima.stages.shipped.find_recipe", Path)
    monkeypatch.setattr("minima.recipe.loading.load_recipe", lambda path, overrides: overrides)
    monkeypatch.setattr("minima.stages.running.run_stage_command", lambda *given: seen.append(given))
    assert cli.main(["stage", *arguments]) == 0
    assert seen[0][0] == ["x=1"]
    assert seen[0][2] == ["a", "b"]


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "r", "--stagse", "a"])
    assert end.value.code == 2
    assert "--stagse" in capsys.readouterr().err


def test_a_users_mistake_is_text_and_code_2(capsys):
    assert cli.main(["run", "no-such-recipe"]) == 2
    error = capsys.readouterr().err
    assert "there is no recipe 'no-such-recipe'" in error
    assert "why it matters:" in error
    assert "what to do:" in error
    assert "quickstart" in error
    assert "Traceback" not in error


def test_a_file_that_may_not_be_read_is_a_users_mistake(monkeypatch, capsys, tmp_path):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "a"))

    monkeypatch.setattr("minima.cluster.status.status", refuse)
    assert cli.main(["status", "x"]) == 2
    assert f"AccessRefused: {tmp_path}/a: Permission denied (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (["status", "x"], "minima.cluster.status.status"),
        (["stage", "quickstart"], "minima.stages.running.check_run_folder"),
    ],
)
def test_a_file_that_a_disk_fails_to_give_is_named_and_may_be_a_nodes_fault(
    monkeypatch, capsys, tmp_path, command, work
):
    """A job's script asks Slurm for lost nodes after a code 1, and not after a 2."""

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "a"))

    monkeypatch.setattr(work, refuse)
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"minima: FileFailed: [Errno 5] Input/output error: '{tmp_path}/a'")
    assert "Traceback" not in error


def test_our_own_mistake_keeps_its_traceback_and_code_1(monkeypatch, capsys):
    def broken(*given):
        raise KeyError("ours")

    monkeypatch.setattr("minima.stages.running.run_stage_command", broken)
    assert cli.main(["stage", "quickstart"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_another_rank_leaves_the_word_to_rank_0_first(monkeypatch, capsys):
    left = []

    def refused(*given):
        raise StageError("what", "why", "do")

    monkeypatch.setattr("minima.stages.running.run_stage_command", refused)
    monkeypatch.setattr(cli.time, "sleep", left.append)
    monkeypatch.setattr(cli.os, "_exit", left.append)
    for key, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(key, value)
    cli.main(["stage", "quickstart"])
    assert left == [cli._OTHER_RANK_SECONDS, cli.USER_ERROR], "it waits to be ended with the others, then speaks"
    assert capsys.readouterr().err.startswith("[rank 1] minima: StageError: what")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LostRank("Connection closed by peer"), r"^\[rank 0\] the connection to another rank was lost.*is saved\n$"),
        (RuntimeError("oh"), r"(?s)^\[rank 0\] an internal error of minima.*Traceback.*RuntimeError: oh\n$"),
    ],
)
def test_a_rank_that_has_lost_another_says_no_more_than_that(monkeypatch, capsys, error, told):
    """Its own trace would hide what the other one said; a job script reads code 1 as a failure that may be a node's."""

    def run_stage_command(*given):
        raise error

    monkeypatch.setattr("minima.stages.running.run_stage_command", run_stage_command)
    assert cli.main(["stage", "quickstart"]) == cli.OWN_ERROR
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (["stage", "quickstart"], "minima.stages.running.run_stage_command"),
        (["doctor"], "minima.cluster.doctor.doctor"),
    ],
)
def test_a_rank_that_is_done_has_not_failed_whatever_crashes_at_its_end(command, work):
    module, name = work.rsplit(".", 1)
    code = (
        "import ctypes, sys\nlibc = ctypes.CDLL(None)\nlibc.on_exit(libc.abort, None)\n"
        f"import {module} as module\nmodule.{name} = lambda *given: print('worked') or 0\n"
        f"from minima.cli import main\nsys.exit(main({command}))"
    )
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | place, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "worked\n"), done.stderr


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "local"])
def test_launchers_print_the_command_and_exec_it(root, tmp_path, name):
    for program in ("deepspeed", "torchrun"):
        (tmp_path / program).write_text('#!/bin/sh\nprintf "[%s]" "$@"\n')
        (tmp_path / program).chmod(0o755)
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$1" in -m) printf "[%s]" "$@";; *) exec {sys.executable} "$@";; esac\n'
    )
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    environment["MINIMA_RANKS"] = "1" if name == "local" else "3"
    script = root / "launch" / f"{name}.sh"
    hostile = "my $(touch bad) 'recipe'.yaml"
    command = ["bash", str(script), hostile, "--stages", "a,b", "x=1 2"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed, ran = done.stdout.split("\n", 1)
    assert printed.startswith("+ ")
    assert f"[minima][stage][{hostile}][--stages][a,b][x=1 2]" in ran
    assert name == "local" or "[3]" in ran
    assert not (tmp_path / "bad").exists()
    assert subprocess.run(["bash", str(script)], capture_output=True).returncode == 2, "no recipe: usage"


def test_the_local_launcher_refuses_ranks_that_it_would_drop(root):
    environment = os.environ | {"MINIMA_RANKS": "2"}
    done = subprocess.run(["bash", str(root / "launch/local.sh"), "r"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "MINIMA_RANKS=2" in done.stderr


def test_shell_files_are_clean(root):
    for path in (*sorted((root / "launch").glob("*.sh")), root / ".ci" / "run"):
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
        assert "set -euo pipefail" in path.read_text()


def test_the_wheel_works_without_a_clone(root, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("minima", "ds_configs", "launch", "recipes", "slurm", "setup.py", "pyproject.toml"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, source / name)
    code = "import setuptools.build_meta as build, sys; print(build.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), site, "zip")
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = (
        "import minima, sys\nfrom pathlib import Path\n"
        f"assert Path(minima.__file__).is_relative_to({str(site)!r})\n"
        "from minima.cli import main\nfrom minima.stages.shipped import *\n"
        "assert find_launcher('deepspeed', Path('x.yaml')).is_file()\n"
        "assert find_deepspeed_json('student_zero3.json', Path('x.yaml')).is_file()\n"
        "cluster = str(shipped_folder('slurm') / 'cluster.example.yaml')\n"
        "assert main(['submit', 'quickstart', '--cluster', cluster, '--dry-run', '--stages', 'english']) == 0\n"
        "sys.exit(main(['run', 'quickstart', '--dry-run']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "# what would run" in run.stdout
    assert "student" in run.stdout
    assert (site / "minima" / "py.typed").is_file()
    entry = next(site.glob("*.dist-info")) / "entry_points.txt"
    assert "minima = minima.cli:main" in entry.read_text()


def test_a_dry_run_refuses_a_launcher_that_is_not_there():
    assert cli.main(["run", "quickstart", "--dry-run", "--launcher", "nonsense"]) == 2
