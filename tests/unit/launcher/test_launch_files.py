"""What the files of launch/ start: their programs are replaced by ones that write down what they were called with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BIN = Path(sys.prefix) / "bin"
PROGRAMS = ("mpirun", "srun", "torchrun", "deepspeed", "pdsh", "minima")
TOLD = """import json, os, sys
file = os.environ.get("DS_ENV_FILE")
asked = {"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "environment": dict(os.environ)}
asked["file"] = open(file).read() if file else None
open(os.environ["TOLD"], "w").write(json.dumps(asked))
"""


@pytest.fixture
def start(tmp_path):
    """Run a file of launch/ with a recipe and variables; gives what its program was told, or what was refused."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(f"#!{sys.executable}\n{TOLD}")
        (programs / name).chmod(0o755)

    def go(name, *arguments, without=(), folder=tmp_path, **variables):
        for program in without:
            (programs / program).unlink()
        told = tmp_path / "told.json"
        path = os.pathsep.join([str(programs), str(BIN), "/usr/bin", "/bin"])
        if without:  # this machine may have it
            path = os.pathsep.join([str(programs), str(plain_tools(tmp_path))])
        environment = {"PATH": path, "HOME": str(tmp_path), "TOLD": str(told), "PYTHONPATH": str(ROOT)} | variables
        command = ["/bin/bash", str(ROOT / "launch" / f"{name}.sh"), *(arguments or ["a recipe.yaml"])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            assert done.returncode == 2 and not told.exists(), done.stderr
            return done.stderr
        asked = json.loads(told.read_text())
        told.unlink()
        printed = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {done.stdout.splitlines()[0][2:]}"], capture_output=True, text=True
        )
        assert printed.stdout.splitlines() == asked["argv"], "the printed command is the one that was started"
        return asked

    return go


def plain_tools(folder: Path) -> Path:
    """A folder of links to what the scripts need, so that no other program is found."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("sed", "id", "grep", "tr", "wc", "cut", "mktemp", "rm", "cat"):
        (tools / name).symlink_to(
            next(path for path in (Path("/usr/bin") / name, Path("/bin") / name) if path.exists())
        )
    (tools / "python").write_text(f'#!/bin/sh\nexec {BIN / "python"} "$@"\n')
    (tools / "python").chmod(0o755)
    return tools


def values(argv: list[str], option: str) -> list[str]:
    """What follows an option, each time that it is given."""
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


STAGE = ["python", "-m", "minima", "stage", "a recipe.yaml"]


# -- mpirun --------------------------------------------------------------------------------------------------------


def test_mpirun_on_this_machine(start):
    asked = start("mpirun", MINIMA_RANKS="3", HF_HUB_OFFLINE="1", HF_TOKEN="hf_secret", EDITOR="vi")
    argv = asked["argv"]
    assert argv[0] == "mpirun" and argv[-5:] == STAGE
    assert values(argv, "-np") == ["3"] and "--oversubscribe" in argv and values(argv, "--bind-to") == ["none"]
    assert ("--allow-run-as-root" in argv) == (os.getuid() == 0)
    assert asked["environment"]["MASTER_ADDR"] == "127.0.0.1" and int(asked["environment"]["MASTER_PORT"]) > 0
    assert {"MASTER_ADDR", "MASTER_PORT", "HF_HUB_OFFLINE", "HF_TOKEN", "PATH", "PYTHONPATH"} <= set(values(argv, "-x"))
    assert "EDITOR" not in values(argv, "-x")
    assert not any("hf_secret" in word for word in argv), "a token would show in every process list"


def test_mpirun_on_the_machines_of_a_file(start, tmp_path):
    hosts = tmp_path / "my hosts"
    hosts.write_text("n1 slots=2\nn2 slots=2\n")
    asked = start("mpirun", "r.yaml", "--stages", "a", MINIMA_HOSTFILE=str(hosts))
    argv = asked["argv"]
    assert values(argv, "--hostfile") == [str(hosts)] and not values(argv, "-np") and not values(argv, "--map-by")
    assert "MASTER_ADDR" not in asked["environment"], "mpi4py tells the ranks"
    assert argv[-3:] == ["r.yaml", "--stages", "a"]
    argv = start("mpirun", MINIMA_HOSTFILE=str(hosts), MINIMA_RANKS="4", MASTER_ADDR="n1-ib")["argv"]
    assert values(argv, "--map-by") == ["ppr:4:node"] and "MASTER_ADDR" in values(argv, "-x")
    assert "cannot be read" in start("mpirun", MINIMA_HOSTFILE="/no/such")


def test_mpirun_in_a_job_of_several_nodes(start):
    asked = start("mpirun", MINIMA_RANKS="4", SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2")
    assert values(asked["argv"], "--map-by") == ["ppr:4:node"]
    assert "MASTER_ADDR" not in asked["environment"]
    one = start("mpirun", MINIMA_RANKS="4", SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="1")
    assert values(one["argv"], "-np") == ["4"] and one["environment"]["MASTER_ADDR"] == "127.0.0.1"


# -- srun ----------------------------------------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}


def test_srun_outside_of_a_job_is_refused(start):
    assert "SLURM_JOB_ID is not set" in start("srun", MINIMA_RANKS="2")


def test_srun_inside_a_step_of_many_tasks_is_refused(start):
    assert "task 1 of 4" in start("srun", **JOB, SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="1", MINIMA_RANKS="2")


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"MINIMA_RANKS": "4", "SLURM_NTASKS": "2"}, ["--nodes=2", "--ntasks=8", "--ntasks-per-node=4"]),
        ({"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3"}, ["--ntasks=6", "--ntasks-per-node=3"]),
        ({"SLURM_NTASKS": "5"}, ["--ntasks=5"]),
        ({"SLURM_NTASKS_PER_NODE": "3"}, ["--nodes=2", "--ntasks=6", "--ntasks-per-node=3"]),
        ({"SLURM_GPUS_ON_NODE": "8"}, ["--nodes=2", "--ntasks=16", "--ntasks-per-node=8"]),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, ["--nodes=2", "--ntasks=8", "--ntasks-per-node=4"]),
    ],
)
def test_srun_takes_its_ranks_from_the_job(start, variables, where):
    argv = start("srun", **JOB, **variables)["argv"]
    assert argv == ["srun", "--kill-on-bad-exit=1", "--export=ALL", *where, *STAGE]


@pytest.mark.parametrize("ranks", [{}, {"MINIMA_RANKS": "two"}, {"MINIMA_RANKS": "0"}])
def test_srun_without_a_number_of_ranks_is_refused(start, ranks):
    assert "the number of ranks per node is unknown" in start("srun", **JOB, **ranks)


def test_srun_logs_cores_and_leftovers(start):
    log = {"MINIMA_SRUN_OUTPUT": "logs of x/%t.log", "MINIMA_SRUN_OPTIONS": "--cpu-bind=cores --label"}
    asked = start("srun", **JOB, **log, MINIMA_RANKS="1", SLURM_CPUS_PER_TASK="6", RANK="9", WORLD_SIZE="10")
    argv = asked["argv"]
    assert {"--output=logs of x/%t.log", "--open-mode=append", "--cpus-per-task=6", "--label"} <= set(argv)
    assert not {"RANK", "WORLD_SIZE"} & set(asked["environment"]), "of another launcher"


# -- torchrun ------------------------------------------------------------------------------------------------------


def test_torchrun_on_this_machine(start):
    argv = start("torchrun", MINIMA_RANKS="2", MASTER_ADDR="elsewhere", MASTER_PORT="1")["argv"]
    assert values(argv, "--nnodes") == ["1"] and values(argv, "--master-addr") == ["127.0.0.1"]
    assert values(argv, "--master-port") != ["1"] and not values(argv, "--node-rank")
    assert argv[-4:] == ["--module", "minima", "stage", "a recipe.yaml"]


def test_torchrun_in_each_task_of_an_srun(start):
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_NUM_NODES": "2"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "MINIMA_RANKS": "8"}
    first = start("torchrun", **step, SLURM_NODEID="0")["argv"]
    second = start("torchrun", **step, SLURM_NODEID="1")["argv"]
    assert values(first, "--node-rank") == ["0"] and values(second, "--node-rank") == ["1"]
    for option, value in (("--master-addr", "gpu03"), ("--nnodes", "2"), ("--nproc-per-node", "8")):
        assert values(first, option) == values(second, option) == [value]
    assert values(first, "--master-port") == values(second, "--master-port")
    refused = start("torchrun", **step | {"SLURM_STEP_NUM_TASKS": "16"}, SLURM_NODEID="0")
    assert "--ntasks-per-node=1" in refused
    refused = start("torchrun", **step | {"SLURM_STEP_NUM_NODES": "1"}, SLURM_NODEID="0")
    assert "2 tasks on 1 nodes" in refused


def test_torchrun_on_machines_without_slurm(start):
    place = {"MINIMA_NODES": "2", "MINIMA_RANKS": "4"}
    argv = start("torchrun", **place, MINIMA_NODE_RANK="1", MASTER_ADDR="n1")["argv"]
    told = [values(argv, option)[0] for option in ("--node-rank", "--master-addr", "--master-port")]
    assert told == ["1", "n1", "29500"]
    assert "without MASTER_ADDR" in start("torchrun", **place, MINIMA_NODE_RANK="1")
    assert "MINIMA_NODE_RANK=missing" in start("torchrun", **place, MASTER_ADDR="n1")
    assert "MINIMA_NODE_RANK=2" in start("torchrun", **place, MASTER_ADDR="n1", MINIMA_NODE_RANK="2")
    assert "one machine" in start("torchrun", **place, MASTER_ADDR="n1", MINIMA_NODE_RANK="1", MINIMA_DRIVER="5")
    assert "not a number" in start("torchrun", MINIMA_NODES="two")


@pytest.mark.parametrize("name", ["mpirun", "deepspeed", "srun"])
def test_ranks_are_told_by_their_own_launcher_alone(start, tmp_path, name):
    """Of a rank of torchrun, say, in whose shell a launcher is called: all ranks would take themselves for that one."""
    hosts = tmp_path / "hosts"
    hosts.write_text("n1 slots=2\n")
    more = {"MINIMA_HOSTFILE": str(hosts), "MINIMA_DEEPSPEED_LAUNCHER": "openmpi"} if name == "deepspeed" else {}
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    asked = start(name, MINIMA_RANKS="2", SLURM_JOB_ID="7", **told, **more)
    assert not told.keys() & asked["environment"].keys()


# -- deepspeed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two machines\n\nn1 slots=2\nn2   slots=2\n")
    return path


def test_deepspeed_reaches_machines_through_pdsh(start, hosts, tmp_path):
    (tmp_path / ".deepspeed_env").write_text("MINE=1")
    asked = start("deepspeed", MINIMA_HOSTFILE=str(hosts), HF_HUB_OFFLINE="1", HF_TOKEN="hf_secret", MINIMA_RANKS="2")
    argv = asked["argv"]
    assert values(argv, "--launcher") == ["pdsh"] and values(argv, "--hostfile") == [str(hosts)]
    assert values(argv, "--master_addr") == ["n1"] and "--force_multi" in argv
    assert argv[-4:] == ["--module", "minima", "stage", "a recipe.yaml"]
    lines = asked["file"].splitlines()
    assert {"MINE=1", "HF_HUB_OFFLINE=1"} <= set(lines) and not any("hf_secret" in line for line in lines)


@pytest.mark.parametrize("by", ["pdsh", "openmpi", "slurm"])
def test_deepspeed_is_given_no_token_that_it_would_write_into_a_command_line(start, hosts, by):
    chosen = {"MINIMA_HOSTFILE": str(hosts), "MINIMA_DEEPSPEED_LAUNCHER": by, "SLURM_JOB_ID": "7"}
    asked = start("deepspeed", **chosen, MLFLOW_TRACKING_TOKEN="secret", MLFLOW_TRACKING_URI="http://x")
    assert not [name for name in asked["environment"] if name.startswith("MLFLOW")]


def test_deepspeed_reaches_machines_through_open_mpi(start, hosts):
    asked = start("deepspeed", MINIMA_HOSTFILE=str(hosts), MINIMA_DEEPSPEED_LAUNCHER="openmpi", MASTER_PORT="77")
    assert values(asked["argv"], "--launcher") == ["openmpi"]
    assert {"MASTER_ADDR=n1", "MASTER_PORT=77"} <= set(asked["file"].splitlines())
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in asked["environment"]) == (os.getuid() == 0)


def test_deepspeed_reaches_machines_through_slurm(start, hosts):
    chosen = {"MINIMA_HOSTFILE": str(hosts), "MINIMA_DEEPSPEED_LAUNCHER": "slurm"}
    assert "inside a Slurm job" in start("deepspeed", **chosen)
    argv = start("deepspeed", **chosen, SLURM_JOB_ID="7", MINIMA_DEEPSPEED_LAUNCHER_ARGS="--label")["argv"]
    assert "--launcher_args=--kill-on-bad-exit=1 --label" in argv
    assert "--module" not in argv and Path(argv[-3]).name == "minima", "its srun starts a file"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MINIMA_DEEPSPEED_LAUNCHER": "mpich"}, "must be pdsh, openmpi or slurm"),
        ({"MINIMA_RANKS": "4"}, "MINIMA_RANKS=4"),
        ({"MINIMA_HOSTFILE": "/no/such"}, "cannot be read"),
        ({"MINIMA_HOSTFILE": ""}, "without MINIMA_HOSTFILE"),
        ({"MINIMA_HOSTFILE": "/dev/null"}, "no line like"),
        ({"MASTER_ADDR": "$(id)"}, "$(id) is not the name or address of a machine"),
    ],
)
def test_deepspeed_refuses(start, hosts, variables, said):
    chosen = {"MINIMA_HOSTFILE": str(hosts), "MINIMA_DEEPSPEED_LAUNCHER": "pdsh"}
    assert said in start("deepspeed", **chosen | variables)


@pytest.mark.parametrize("argument", ["x=$(id)", "a`id`", "x=a b\\", "x=a;id", "it's.yaml", "a\nb", "x={a,b}"])
def test_deepspeed_gives_pdsh_nothing_that_a_shell_would_read(start, hosts, argument):
    assert "would read more than text in it" in start("deepspeed", argument, MINIMA_HOSTFILE=str(hosts))


def test_deepspeed_gives_pdsh_what_it_quotes(start, hosts):
    argument = "stages.t.target={layers: 2, note: it's; (a) <b>}"
    assert start("deepspeed", argument, MINIMA_HOSTFILE=str(hosts))["argv"][-1] == argument


@pytest.mark.parametrize(("name", "said"), [("two words", "at its spaces"), ("a$b", "more than text in it")])
def test_deepspeed_with_pdsh_refuses_a_folder_that_a_shell_would_not_reach(start, hosts, tmp_path, name, said):
    (tmp_path / name).mkdir()
    assert said in start("deepspeed", MINIMA_HOSTFILE=str(hosts), folder=tmp_path / name)


def test_deepspeed_without_pdsh_is_refused(start, hosts):
    assert "needs pdsh" in start("deepspeed", MINIMA_HOSTFILE=str(hosts), without=["pdsh"])


# -- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "deepspeed", "torchrun", "mpirun", "srun"])
def test_each_says_how_it_is_called(name):
    done = subprocess.run(["bash", str(ROOT / "launch" / f"{name}.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and f"launch/{name}.sh RECIPE" in done.stderr and "MINIMA_RANKS" in done.stderr


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "mpirun", "srun"])
def test_ranks_read_files_as_utf_8_whatever_the_locale_is(start, name):
    """PyTorch's own sources are read in the locale's encoding where a file says nothing, and are none in GB18030."""
    job = JOB | {"SLURM_NTASKS": "2"} if name == "srun" else {"MINIMA_RANKS": "2"}
    assert start(name, **job)["environment"]["PYTHONUTF8"] == "1"
    assert start(name, **job, PYTHONUTF8="0")["environment"]["PYTHONUTF8"] == "0"


def test_other_machines_are_told_so_too(start, hosts):
    asked = start("deepspeed", MINIMA_HOSTFILE=str(hosts), MINIMA_DEEPSPEED_LAUNCHER="pdsh")
    assert "PYTHONUTF8=1" in asked["file"].splitlines()
    assert "PYTHONUTF8" in values(start("mpirun", MINIMA_HOSTFILE=str(hosts))["argv"], "-x")


def test_shellcheck_finds_nothing():
    files = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "tools").glob("*.sh")), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", "--external-sources", *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "mpirun", "srun", "local"])
@pytest.mark.parametrize("ranks", ["0", "-1", "two", "1.5"])
def test_what_is_no_number_of_ranks_is_refused(start, name, ranks):
    """deepspeed and mpirun start nothing for 0, and say that all is well."""
    assert "MINIMA_RANKS" in start(name, MINIMA_RANKS=ranks, SLURM_JOB_ID="7")
