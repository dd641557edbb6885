"""The scripts: complete and clean for the paper's runs, and safe whatever anybody is called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from minima.cluster.submit import submit
from minima.errors import ClusterError
from minima.stages.shipped import find_recipe

CLONE = Path(__file__).parents[3]
EXAMPLE = CLONE / "slurm" / "cluster.example.yaml"


def dry_run(recipe: Path, cluster: Path, overrides=(), names=None, grid=None) -> str:
    said: list[str] = []
    assert submit(recipe, list(overrides), cluster, names, grid, True, said.append) == 0
    return "\n".join(said)


def scripts_in(text: str) -> dict[str, str]:
    """The scripts of a dry run by their file names."""
    found = {}
    for part in text.split("# ==> ")[1:]:
        first, _, rest = part.partition("\n")
        if first.endswith(".sbatch") and not first.startswith("sbatch"):
            found[Path(first).name] = rest.rstrip() + "\n"
    return found


def shellcheck(*files: Path, but: str = "SC0000") -> None:
    program = shutil.which("shellcheck")
    assert program, "install the Debian package shellcheck"
    done = subprocess.run(
        [program, "--external-sources", f"--exclude={but}", *files], capture_output=True, text=True, cwd=CLONE
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("recipe", "nodes"),
    [
        (
            "minima-3b",
            {"expanded": 1, "corpus": 1, "teacher": 4, "pruned": 1, "student": 2, "quality": 1, "minima": 1},
        ),
        ("minichat-3b", {"conversations": 1, "chat": 1, "quality": 1, "minichat": 1, "benchmark": 1}),
    ],
)
def test_the_papers_runs(recipe, nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(CLONE)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")  # a dry run needs no Slurm
    text = dry_run(find_recipe(recipe), EXAMPLE)
    scripts = scripts_in(text)
    assert list(scripts) == [f"{stage}.sbatch" for stage in nodes]
    files = []
    for stage, count in nodes.items():
        script = scripts[f"{stage}.sbatch"]
        assert f"#SBATCH --nodes={count}\n" in script
        assert "--nodelist" not in script  # the nodes come from the allocation
        assert {"#SBATCH --signal=B:USR1@600", "#SBATCH --requeue", "export HF_HUB_OFFLINE=1"} < set(
            script.splitlines()
        )
        files.append(tmp_path / f"{stage}.sbatch")
        files[-1].write_text(script)
    shellcheck(*files)
    commands = [line for line in text.splitlines() if line.startswith("# ==> sbatch")]
    for before, command in zip(nodes, commands[1:], strict=False):
        assert f"--dependency=afterok:ID_OF_{recipe}.{before} --kill-on-invalid-dep=yes" in command


def test_the_papers_ranks():
    text = EXAMPLE.read_text()
    stages = yaml.safe_load(text)["stages"]
    ranks = {kind: stages[kind]["nodes"] * 8 for kind in ("prune", "adapt", "distil", "instruct")}
    assert ranks == {"prune": 8, "adapt": 32, "distil": 16, "instruct": 8}


def test_the_plain_files_are_clean_and_ask_for_what_the_example_does(monkeypatch):
    monkeypatch.chdir(CLONE)
    files = sorted((CLONE / "slurm").glob("*/*.sbatch"))
    shellcheck(*files, *sorted((CLONE / "slurm").glob("*.sh")))
    for folder, recipe in (("minima", "minima-3b"), ("minichat", "minichat-3b")):
        made = scripts_in(dry_run(find_recipe(recipe), EXAMPLE))
        assert set(made) == {path.name for path in files if path.parent.name == folder}
        chain = (CLONE / "slurm" / f"{folder}.sh").read_text()
        assert f"for stage in {' '.join(name.removesuffix('.sbatch') for name in made)}; do" in chain
        for name, script in made.items():
            plain = (CLONE / "slurm" / folder / name).read_text()
            for option in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "signal"):
                lines = [line for line in script.splitlines() if line.startswith(f"#SBATCH --{option}=")]
                assert [line for line in plain.splitlines() if line.startswith(f"#SBATCH --{option}=")] == lines, name


def test_the_plain_chain(slurm, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(CLONE / "slurm", clone / "slurm")
    done = clone / "runs/minima-3b/expanded"
    done.mkdir(parents=True)
    (done / "manifest.json").touch()
    subprocess.run([clone / "slurm" / "minima.sh", "a=b c"], check=True, capture_output=True)
    calls = slurm.calls("sbatch")
    assert [call[-2:] for call in calls[:2]] == [
        ["slurm/minima/corpus.sbatch", "a=b c"],
        ["slurm/minima/teacher.sbatch", "a=b c"],
    ]
    assert "--dependency=afterok:101" in calls[1] and "--dependency=afterok:105" in calls[5]


def test_a_plain_file_starts_its_stage(slurm, tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    shutil.copytree(CLONE / "slurm", clone / "slurm")
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/activate").touch()
    monkeypatch.chdir(clone)
    slurm.job(Path("slurm/minima/corpus.sbatch")).communicate()
    [arguments] = slurm.calls("srun")
    command = "python -m minima stage recipes/minima-3b.yaml --stages corpus"
    assert " ".join(arguments).endswith(f"--nodes=1 --ntasks=1 {command}")


@pytest.mark.parametrize("argument", ["output=/scratch/x", "name=other"])
@pytest.mark.parametrize("file", ["minima.sh", "minichat.sh", "minima/student.sbatch", "minichat/chat.sbatch"])
def test_plain_files_refuse_another_folder_than_the_one_that_they_look_into(slurm, tmp_path, file, argument):
    clone = tmp_path / "clone"
    shutil.copytree(CLONE / "slurm", clone / "slurm")
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/activate").touch()
    environment = os.environ | {"SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", f"slurm/{file}", argument], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and argument in done.stdout + done.stderr
    assert not slurm.calls("sbatch") and not slurm.calls("srun")


HOSTILE = "a b'\"$(touch A)`touch B`;touch C;#&|>D *~%n"


def test_nothing_in_a_name_is_executed(slurm, project, monkeypatch):
    folder = project / f"work {HOSTILE}"
    folder.mkdir()
    recipe = folder / f"{HOSTILE}\ntouch E.yaml"
    shutil.copy(project / "recipe.yaml", recipe)
    cluster = yaml.safe_load((project / "cluster.yaml").read_text())
    cluster["environment"] = {"LEAD": f"{HOSTILE}\ntouch F"}
    cluster["srun_options"] = [f"--comment={HOSTILE}"]
    (project / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    monkeypatch.chdir(folder)
    quoted = HOSTILE.replace("'", "''")
    overrides = [f"output='runs {quoted}'", "stages.base.weight_decay=0.1 # \n# $(touch G)"]
    submit(recipe, overrides, project / "cluster.yaml", None, None, False, lambda text: None)
    run_folder = folder / f"runs {HOSTILE}"
    assert (run_folder / "cluster" / "jobs.json").is_file()
    for name in ("corpus", "base", "out"):
        script = run_folder / "cluster" / f"{name}.sbatch"
        before = sorted(path for path in project.rglob("*") if path.suffix != ".log")
        log, _ = slurm.job(script).communicate()
        assert sorted(path for path in project.rglob("*") if path.suffix != ".log") == before, log
        shellcheck(script)
    call = next(entry for entry in slurm.entries("srun") if "base" in entry["arguments"])
    assert call["lead"] == f"{HOSTILE}\ntouch F"
    assert f"--comment={HOSTILE}" in call["arguments"]
    assert call["arguments"][-2:] == overrides
    assert f"--output=runs {HOSTILE.replace('%', '%%')}/logs/base-7-rank%t.log" in call["arguments"]
    submitted = slurm.calls("sbatch")[0]
    assert f"--chdir={folder}" in submitted and submitted[-1] == str(run_folder / "cluster/corpus.sbatch")
    assert not any(f"work {HOSTILE}" in line for line in script.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\x1bb"])
def test_a_folder_that_slurm_cannot_be_told(slurm, project, name):
    overrides = [f"output={yaml.safe_dump(name, default_style=chr(34)).strip()}"]
    with pytest.raises(ClusterError, match="backslash or a control character"):
        submit(project / "recipe.yaml", overrides, project / "cluster.yaml", None, None, False, print)
    assert not slurm.calls("sbatch")


@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_a_folder_that_no_container_can_be_given(slurm, project, monkeypatch, name):
    folder = project / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    arguments = (project / "recipe.yaml", [], project / "cluster.yaml", None, None, False, lambda text: None)
    submit(*arguments)
    assert len(slurm.calls("sbatch")) == 3
    (project / "cluster.yaml").write_text(yaml.safe_dump({"container": {"image": "a.sqsh"}}))
    with pytest.raises(ClusterError, match="a comma or a colon"):
        submit(*arguments)


@pytest.mark.parametrize(
    ("mounts", "told"),
    [([], True), (["/scratch"], False), (["/data:/scratch/x"], False), (["/scratch/other"], True)],
)
def test_a_run_folder_that_no_container_sees_is_told(slurm, project, mounts, told):
    (project / "cluster.yaml").write_text(yaml.safe_dump({"container": {"image": "a.sqsh", "mounts": mounts}}))
    for output, outside in (("/scratch/x/run", told), ("runs/a", False), (f"{project}/b", False)):
        said = dry_run(project / "recipe.yaml", project / "cluster.yaml", [f"output={output}"])
        assert ("will be lost with the container" in said) == outside


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container(project, slurm, runtime):
    cluster = {
        "container": {"runtime": runtime, "image": "my image.sqsh", "mounts": ["/scratch"]},
        "defaults": {"gpus_per_node": 4},
    }
    (project / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    submit(project / "recipe.yaml", [], project / "cluster.yaml", ["corpus", "base"], None, False, print)
    slurm.job(Path("runs/test/cluster/base.sbatch")).communicate()
    [arguments] = slurm.calls("srun")
    inner = arguments[arguments.index("-m") - 1 :]
    assert inner[:4] == ["python", "-m", "minima", "stage"]
    if runtime == "pyxis":
        assert {"--container-image=my image.sqsh", f"--container-mounts={project}:{project},/scratch"} < set(arguments)
    else:
        at = arguments.index("apptainer")
        assert arguments[at : at + 3] == ["apptainer", "exec", "--nv"] and arguments[-9] != "python"
        assert {f"--bind={project}", "--bind=/scratch", "my image.sqsh"} < set(arguments)


def test_a_home_is_written_out(project, slurm, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    (project / "env/bin").mkdir(parents=True)
    (project / "env/bin/activate").write_text("export LEAD=active\n")
    (project / "cluster.yaml").write_text("venv: ~/env")
    submit(project / "recipe.yaml", [], project / "cluster.yaml", ["corpus"], None, False, print)
    job = slurm.job(Path("runs/test/cluster/corpus.sbatch"))
    log, _ = job.communicate()
    assert job.returncode == 0 and slurm.entries("srun")[0]["lead"] == "active", log


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_home_is_written_out_for_a_container(project, monkeypatch, runtime):
    monkeypatch.setenv("HOME", "/home/me")
    container = {"runtime": runtime, "image": "~/minima.sqsh", "mounts": ["~/data:/data", "/data:~/data"]}
    (project / "cluster.yaml").write_text(yaml.safe_dump({"container": container}))
    script = scripts_in(dry_run(project / "recipe.yaml", project / "cluster.yaml", names=["corpus"]))["corpus.sbatch"]
    for text in ("/home/me/minima.sqsh", "/home/me/data:/data", "/data:/home/me/data"):
        assert text in script


@pytest.mark.parametrize(
    ("preamble", "code", "said"),
    [
        (["false", "true"], 1, "the job ended before its stage began, with exit code 1, at: false\n"),
        (["[ -z there ] || exit 3"], 3, "the job ended before its stage began, with exit code 3, at: exit 3\n"),
        (["trap 'echo cleared' EXIT", "false"], 1, "cleared\n"),
    ],
)
def test_a_preamble_that_fails_ends_the_job_and_says_where(project, slurm, preamble, code, said):
    (project / "cluster.yaml").write_text(yaml.safe_dump({"preamble": preamble}))
    submit(project / "recipe.yaml", [], project / "cluster.yaml", ["corpus"], None, False, print)
    job = slurm.job(Path("runs/test/cluster/corpus.sbatch"))
    assert job.communicate()[0] == said
    assert job.returncode == code and not slurm.calls("srun")


def test_a_preamble_may_have_a_trap_of_its_own(project, slurm):
    (project / "cluster.yaml").write_text(yaml.safe_dump({"preamble": ["trap 'echo cleared' EXIT"]}))
    submit(project / "recipe.yaml", [], project / "cluster.yaml", ["corpus"], None, False, print)
    said = slurm.job(Path("runs/test/cluster/corpus.sbatch")).communicate()[0]
    assert said.endswith("cleared\n") and slurm.calls("srun") and "before its stage began" not in said


def test_what_a_dry_run_prints_is_a_script_wherever_it_is_cut(tmp_path):
    recipe = tmp_path / "it's $(here).yaml"
    recipe.write_text(find_recipe("minima-3b").read_text())
    text = dry_run(recipe, EXAMPLE, [f"output={tmp_path}/it's"])
    for number, part in enumerate(text.split("#!/usr/bin/env bash")[1:]):
        path = tmp_path / f"{number}.sh"  # with the lines that follow it
        path.write_text("#!/usr/bin/env bash" + part)
        subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck(path)
