"""The driver, with a launcher that only pretends: what runs, in which groups, what is kept when something fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from minima.errors import DeepSpeedConfigError, DiskFull, LauncherError, RecipeError, StageError, Stopped
from minima.models.checksums import write_checksums
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.stages.driver import checks, pipeline
from minima.stages.driver.child import Log
from minima.stages.manifest import write_manifest, write_started
from minima.stages.run_folder import claim_run_folder

TRAINING = "data: corpus, batch_sequences: 8, micro_batch_sequences: 4, steps: 4, learning_rate: 1e-3"
RECIPE = f"""
name: tiny
output: out
ranks: 2
summary:
  teacher: {{loss: teacher.loss, mean: [teacher.loss, student.loss]}}
  deep: teacher.by.a.b
stages:
  - {{name: teacher, kind: adapt, model: base, {TRAINING.replace("corpus", "text")}}}
  - {{name: pruned, kind: prune, model: teacher, data: text, target: {{hidden_size: 16}}}}
  - {{name: pruned.2, kind: prune, model: teacher, data: text, target: {{hidden_size: 8}}}}
  - {{name: student, kind: distil, model: pruned, teacher: teacher, {TRAINING.replace("corpus", "text")}}}
  - {{name: quality, kind: evaluate, models: [student], data: text}}
  - {{name: out, kind: export, model: student}}
"""
# Stands for launch/X.sh: publishes stages as a rank would, notes how it was called, and fails or waits where told.
FAKE = """
import os, sys, time
from pathlib import Path
from minima.recipe.loading import load_recipe
from minima.stages.identity import describe
from minima.stages.manifest import *
names = sys.argv[3].split(",")
recipe = load_recipe(Path(sys.argv[1]), sys.argv[4:])
with open("calls", "a") as file:
    file.write(",".join(names) + " " + os.environ["MINIMA_RANKS"] + "\\n")
for name in names:
    print("== stage " + name + " (kind)", flush=True)
    print("progress 1\\rprogress 2\\rprogress of " + name, flush=True)
    folder = Path("out", name)
    folder.mkdir(exist_ok=True)
    write_started(folder, describe(recipe, recipe.stage(name), Path("out")))
    if Path("fail-" + name).exists():
        print("minima: DataError: it broke\\n  why it matters: x\\npages\\nof the launcher", file=sys.stderr)
        sys.exit(7)
    if Path("kill-" + name).exists():
        print(Path("kill-" + name).read_text())
        sys.exit(int(os.environ["EXIT_CODE"]))
    if Path("wait-" + name).exists():
        time.sleep(60)
    if Path("touch-" + name).exists():
        Path("base", "config.json").write_text("changed while the run went on")
    loss = {"teacher": 1.0, "student": 2.0}.get(name, 0.5)
    write_manifest(folder, {"loss": loss, "tokens": 100, "by": {"a.b": 3}}, 1.5)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # two ranks, on a machine with one GPU too
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "base").mkdir()
    (tmp_path / "text" / "train").mkdir(parents=True)
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "fake.sh").write_text(f'exec "{sys.executable}" fake.py "$@"\n')
    monkeypatch.setattr(pipeline, "find_launcher", lambda name, recipe_path: tmp_path / "fake.sh")
    said: list[str] = []

    def run(*overrides, names=None):
        said.clear()
        code = pipeline.run(tmp_path / "tiny.yaml", overrides, names, said.append)
        return code, "\n".join(said)

    return run


def test_what_finished_stages_lack_is_told(tmp_path):
    reasons = {"known": 3, "rare": 2}  # why pieces did not come: no task was left out
    for name, kind, metrics in (
        ("out", "export", {}), ("bench", "benchmark", {"left_out": ["humaneval"]}),
        ("expanded", "expand_vocabulary", {"left_out": reasons}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        write_started(tmp_path / name, {"stage": {"kind": kind}})
        write_manifest(tmp_path / name, metrics, 1.0)
    (tmp_path / "out" / "model").mkdir()
    for shard in ("a", "b"):
        (tmp_path / "out" / "model" / f"{shard}.safetensors").write_bytes(b"x")
    write_checksums(tmp_path / "out")
    assert pipeline.lacking(tmp_path, ["out", "bench"], False) == []
    (tmp_path / "out" / "model" / "b.safetensors").unlink()
    gone, unused = pipeline.lacking(tmp_path, ["out", "expanded", "bench"], True)
    assert gone.startswith("stage out is finished") and gone.endswith("out/model/b.safetensors no longer exists")
    assert "--allow-code-execution does not change stage bench" in unused and "humaneval" in unused
    (tmp_path / "bench" / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "bench" / "checkpoints" / "step-00000004" / "checkpoint.json").write_text("{}")
    write_checksums(tmp_path / "bench")
    assert pipeline.lacking(tmp_path, ["bench"], False) == []
    shutil.rmtree(tmp_path / "bench" / "checkpoints")
    (purged,) = pipeline.lacking(tmp_path, ["bench"], False)
    assert purged.endswith("bench/checkpoints/step-00000004/checkpoint.json no longer exists")
    (tmp_path / "out" / "checksums.json").write_text('{"format": "minima-checksums-1", "files": 3}')
    assert "checksums.json" in pipeline.lacking(tmp_path, ["out"], False)[0], "told, and no reason to end"


def calls(tmp_path):
    return (tmp_path / "calls").read_text().split("\n")[:-1] if (tmp_path / "calls").exists() else []


def test_a_whole_run(run, tmp_path, capfdbinary):
    code, said = run()
    assert code == 0
    assert calls(tmp_path) == ["teacher 2", "pruned,pruned.2 2", "student 2", "quality,out 2"], (
        "short ones share a group"
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == {
        "teacher": {"loss": 1.0, "mean": 1.5},
        "deep": 3,
        "tokens": 200,
        "seconds": 9.0,
        "export": {"out": "out/out/model"},
    }
    assert "all done: every stage is finished; out/summary.json" in said
    assert "teacher.mean" in said
    log = (tmp_path / "out" / "logs" / "pruned.2.log").read_text()
    assert log == "== stage pruned.2 (kind)\nprogress of pruned.2\n", (
        "a log keeps a bar's last state, of its stage only"
    )
    assert b"progress 1\rprogress 2" in capfdbinary.readouterr().out, "a terminal gets every byte"
    code, said = run()
    assert code == 0
    assert "already finished: teacher, pruned, pruned.2, student, quality, out" in said
    assert "all done: every stage was already finished" in said
    assert len(calls(tmp_path)) == 4, "nothing was started again"


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        (["ranks=2"], "2 cpu 3"),
        (["ranks=null"], "none none 3"),
        (["ranks=null", "launcher=mpirun"], "none none 3"),
        (["ranks=null", "launcher=torchrun"], "2 cpu 3"),  # which stays on this machine
    ],
)
def test_a_host_file_says_what_its_machines_get(run, tmp_path, monkeypatch, overrides, seen):
    monkeypatch.setenv("MINIMA_HOSTFILE", "hosts")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr("minima.launcher.num_accelerators", lambda: 0)
    (tmp_path / "fake.sh").write_text(
        'echo "${MINIMA_RANKS:-none} ${DS_ACCELERATOR:-none} $OMP_NUM_THREADS" >seen; exit 7\n'
    )
    assert run(*overrides)[0] == 7
    assert (tmp_path / "seen").read_text() == seen + "\n"


def test_a_failure_stops_the_run_and_is_named(run, tmp_path):
    (tmp_path / "fail-pruned.2").touch()
    code, said = run()
    assert code == 7
    assert "stage pruned.2 failed with exit code 7: DataError: it broke\nits log is out/logs/pruned.2.log" in said
    assert "it broke" in (tmp_path / "out" / "logs" / "pruned.2.log").read_text()
    assert calls(tmp_path)[-1] == "pruned,pruned.2 2"
    (tmp_path / "fail-pruned.2").unlink()
    code, said = run()
    assert code == 0
    assert calls(tmp_path)[2:] == ["pruned.2 2", "student 2", "quality,out 2"], "goes on where it stopped"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (247, "[ERROR] [launch.py:259:sigkill_handler] ['python', '-u'] exits with return code = -9"),  # deepspeed
        (1, "  traceback : Signal 9 (SIGKILL) received by PID 4123"),  # torchrun
        (137, "mpirun noticed that process rank 1 exited on signal 9 (Killed)."),
    ],
)
def test_a_rank_that_the_system_has_killed_is_told_so(run, tmp_path, monkeypatch, code, text):
    monkeypatch.setenv("EXIT_CODE", str(code))
    (tmp_path / "kill-pruned").write_text(text)
    found, said = run()
    assert found == code
    assert (
        f"stage pruned failed with exit code {code}: a process was killed (SIGKILL); if nobody did that by hand" in said
    )
    (tmp_path / "kill-pruned").write_text("nothing of the kind")
    monkeypatch.setenv("EXIT_CODE", "1")
    assert "failed with exit code 1\nits log is" in run()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_rank_alone_is_no_failure_whatever_the_launchers_code(run, tmp_path, monkeypatch, number):
    monkeypatch.setenv("EXIT_CODE", "1")
    torchrun = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
    (tmp_path / "kill-pruned").write_text(f"{Stopped(number, 'step 22 of 60')}\n{torchrun}: minima FAILED")
    code, said = run()
    assert code == 128 + number
    assert "stage pruned was ended by a signal; the same command resumes from what it has saved" in said
    assert "failed" not in said


def test_an_internal_error_beside_a_signal_is_not_hidden(run, tmp_path, monkeypatch):
    monkeypatch.setenv("EXIT_CODE", "1")
    crash = "[rank 1] an internal error of minima, not a mistake in the recipe:"
    (tmp_path / "kill-pruned").write_text(f"{Stopped(signal.SIGTERM, 'step 22 of 60')}\n{crash}")
    code, said = run()
    assert code == 1 and "failed with exit code 1" in said


def test_chosen_stages_need_their_inputs(run, tmp_path):
    with pytest.raises(StageError, match="'student' reads 'pruned', which is not finished"):
        run(names=["student"])
    with pytest.raises(RecipeError, match="no stage is called 'nobody'"):
        run(names=["nobody"])
    code, said = run(names=["pruned", "teacher"])
    assert code == 0
    assert "done: teacher, pruned; left: pruned.2, student, quality, out" in said
    assert calls(tmp_path) == ["teacher 2", "pruned 2"]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_changed_stage_is_refused_before_anything_starts(run, tmp_path):
    assert run(names=["teacher"])[0] == 0
    with pytest.raises(StageError, match=r"'teacher' is finished in .*steps is 5 and was 4"):
        run("stages.teacher.steps=5")
    assert len(calls(tmp_path)) == 1


def test_a_stage_made_again_may_not_leave_a_later_one_behind(run, tmp_path):
    assert run()[0] == 0
    shutil.rmtree(tmp_path / "out" / "teacher")
    with pytest.raises(StageError, match=r"'pruned' is finished in .*its input model \(teacher\) has changed"):
        run("stages.teacher.learning_rate=2e-3")
    assert len(calls(tmp_path)) == 4, "nothing was started"
    assert run()[0] == 0, "the same teacher again is no change"
    assert calls(tmp_path)[4:] == ["teacher 2"]


def test_an_input_that_changes_while_the_run_goes_on_is_named_at_its_end(run, tmp_path):
    (tmp_path / "touch-student").touch()
    with pytest.raises(StageError, match=r"'teacher' is finished in .*its input model \(base\) has changed"):
        run()
    assert calls(tmp_path)[-1] == "quality,out 2"
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("name", ["claim_run_folder", "write_summary", "Log"])
def test_a_full_disk_is_named_where_the_driver_writes(run, tmp_path, monkeypatch, name):
    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, name, full)
        with pytest.raises(DiskFull, match="no space left while writing out"):
            run()
    assert run()[0] == 0


def test_a_log_that_cannot_be_written_is_told_and_ends_nothing(run, tmp_path):
    (tmp_path / "out" / "logs" / "out.log").mkdir(parents=True)
    code, said = run()
    assert code == 0 and "all done" in said
    assert "warning: the logs in out/logs lack lines that could not be written: " in said and "out.log" in said


def test_ranks_need_a_gpu_each_where_there_are_gpus(run, monkeypatch):
    monkeypatch.setattr(checks, "num_accelerators", lambda: 1)
    with pytest.raises(RecipeError, match=r"2 ranks, but 1 GPU on this machine\n.*\n.*--ranks 1.*DS_ACCELERATOR=cpu"):
        run()
    monkeypatch.setattr(checks, "num_accelerators", lambda: 2)
    assert run()[0] == 0
    monkeypatch.setattr(checks, "num_accelerators", lambda: 1)
    assert run()[0] == 0, "nothing is left that would need one"


def test_wandb_has_to_be_there_before_anything_starts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"stages\.student: wandb_project is 'mine', but wandb is not installed"):
        run("stages.student.wandb_project=mine")
    assert not calls(tmp_path)


def test_a_deepspeed_json_that_sets_what_the_recipe_owns_starts_nothing(run, tmp_path):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}')
    with pytest.raises(DeepSpeedConfigError, match="sets gradient_clipping"):
        run("stages.student.deepspeed=own.json")
    assert not (tmp_path / "calls").exists()


def test_a_launcher_beside_the_recipe_comes_first(run, tmp_path):
    from minima.stages.shipped import find_launcher

    recipe = tmp_path / "tiny.yaml"
    with pytest.raises(RecipeError, match=r"no launcher 'torchrn'; did you mean 'torchrun'"):
        run("launcher=torchrn")
    assert find_launcher("torchrun", recipe).parent.name == "launch"
    (tmp_path / "launch").mkdir()
    for name in ("mine", "torchrun"):
        (tmp_path / "launch" / f"{name}.sh").touch()
        assert find_launcher(name, recipe) == tmp_path / "launch" / f"{name}.sh"
    with pytest.raises(RecipeError, match="choose among deepspeed, local, mine, mpirun, srun, torchrun"):
        find_launcher("other", recipe)
    assert run("launcher=mine")[0] == 0


def test_the_folder_of_another_recipe_is_refused(run, tmp_path):
    assert run(names=["teacher"])[0] == 0
    kept = (tmp_path / "out" / "recipe.yaml").read_text()
    with pytest.raises(StageError, match="output folder of another recipe"):
        run("name=other")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == kept


@pytest.mark.parametrize("written", [None, "name: 1e5\nstages: [{name: teacher}]\n"])  # the latter: earlier versions
def test_a_run_whose_name_looks_like_a_number_goes_on(run, tmp_path, written):
    assert run("name='1e5'", names=["teacher"])[0] == 0
    kept = tmp_path / "out" / "recipe.yaml"
    assert load_recipe(kept, []).name == "1e5"
    if written is not None:
        kept.write_text(written)
    assert run("name='1e5'", names=["teacher"])[0] == 0


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(StageError, match=r"no recipe\.yaml"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", [None, b"", b"\xff"])
def test_a_run_that_has_lost_its_recipe_goes_on(run, tmp_path, caplog, content):
    assert run(names=["teacher", "pruned"])[0] == 0
    path = tmp_path / "out" / "recipe.yaml"
    kept = path.read_bytes()
    shutil.rmtree(tmp_path / "out" / "teacher")  # one that is left is enough
    (tmp_path / "out" / "pruned" / "manifest.json").rename(tmp_path / "out" / "pruned" / "left")  # and it is unfinished
    path.unlink() if content is None else path.write_bytes(content)
    code, said = run()
    assert (code, path.read_bytes()) == (0, kept) and "all done" in said
    assert "recipe.yaml was lost or damaged and is written again: stage pruned in that folder was made" in caplog.text


def test_a_run_of_another_recipe_that_has_lost_its_own_is_refused(run, tmp_path):
    assert run(names=["teacher"])[0] == 0
    (tmp_path / "out" / "recipe.yaml").unlink()
    with pytest.raises(StageError, match=r"no recipe\.yaml of a run(.*\n)+.*copy the run's recipe to out/recipe\.yaml"):
        run("stages.teacher.steps=5")
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    shutil.copy(tmp_path / "tiny.yaml", tmp_path / "out" / "recipe.yaml")
    assert run()[0] == 0


def test_what_a_write_that_failed_has_left_is_no_other_run(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".recipe.yaml.4711").write_text("name: ti")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    claim_run_folder(tmp_path / "out", recipe := load_recipe(tmp_path / "tiny.yaml", []))
    assert (tmp_path / "out" / "recipe.yaml").read_text() == resolved_yaml(recipe)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0", b"[]", b"name: tiny", b"name: tiny\nstages: [{name: [a]}]"])
def test_a_folder_whose_recipe_cannot_be_read_is_refused(run, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_bytes(content)
    with pytest.raises(
        StageError, match=r"the output folder out contains files, but no recipe\.yaml|of another recipe"
    ):
        run()


def test_an_output_that_cannot_be_made_starts_nothing(run, tmp_path, monkeypatch):
    with pytest.raises(StageError, match=r"the folder tiny\.yaml/x cannot be used \(.*Not a directory"):
        run("output=tiny.yaml/x")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        with pytest.raises(StageError, match=r"the folder out cannot be used \(.*Permission denied"):
            run()
    assert not calls(tmp_path)


def test_logs_that_cannot_be_written_are_a_mistake_to_mend(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "logs").touch()
    with pytest.raises(StageError, match="the folder out/logs cannot be used"):
        run()


def test_ranks_and_launcher_are_checked(run, monkeypatch):
    with pytest.raises(RecipeError, match="batch_sequences 8 is not divisible by 3 ranks"):
        run("ranks=3")
    with pytest.raises(RecipeError, match="2 ranks with the launcher 'local'"):
        run("launcher=local")
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(LauncherError, match="minima run inside rank 0 of 2"):
        run()


def test_a_metric_that_was_not_measured_is_named(run):
    code, _ = run()
    assert code == 0
    with pytest.raises(RecipeError, match=r"summary\.bad: 'teacher\.los' was not measured"):
        run("summary.bad=teacher.los")


def test_groups():
    kinds = ["build_data", "adapt", "prune", "prune", "distil", "evaluate", "export", "adapt"]

    class Stage:
        def __init__(self, kind):
            self.kind = kind

    groups = pipeline.group_stages([Stage(kind) for kind in kinds])
    assert [len(group) for group in groups] == [1, 1, 2, 1, 2, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_ends_the_run(run, tmp_path, number):
    (tmp_path / "wait-teacher").touch()
    code = "import signal\nimport sys\nfrom pathlib import Path\nfrom minima.stages.driver import pipeline\n"
    # A shell lets what it runs in the background ignore Ctrl-C, and so would the driver if these tests run there.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "pipeline.find_launcher = lambda name, recipe_path: Path('fake.sh')\n"
    code += "sys.exit(pipeline.run(Path('tiny.yaml'), [], None, print))"
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    for _ in range(200):
        if (tmp_path / "out" / "teacher" / "started.json").exists():
            break
        time.sleep(0.05)
    began = time.monotonic()
    os.kill(driver.pid, number)
    output, _ = driver.communicate(timeout=20)
    assert driver.returncode == 128 + number
    assert time.monotonic() - began < 10, "the child slept 60 s, had it not been told"
    assert b"stage teacher was ended by a signal; the same command resumes" in output
    (tmp_path / "wait-teacher").unlink()
    assert run(names=["teacher"])[0] == 0, "the lock is free and the stage goes on"


def test_a_signal_that_comes_as_a_stage_ends_still_ends_the_run(run, tmp_path, monkeypatch):
    """The stage was past its last look for signals, and is finished: the next one may not begin."""
    real = pipeline.run_child

    def told_late(*given):
        assert real(*given) == 0
        return 128 + signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_child", told_late)
        code, said = run()
        assert (code, calls(tmp_path)) == (143, ["teacher 2"])
        assert "a signal came as stage teacher ended; the same command resumes after it" in said
        assert run(names=["pruned", "pruned.2"])[0] == 0, "nothing was left to end"
    assert run()[0] == 0


def test_the_recipe_of_these_tests_is_whole(run, tmp_path):
    assert len(load_recipe(tmp_path / "tiny.yaml").stages) == 6


def test_what_a_stage_prints_does_not_choose_another_folder_for_its_log(tmp_path):
    with Log(tmp_path / "logs", "first") as log:
        log.write(b"== stage ../../outside (adapt)\n== stage second (adapt)\nhello\n")
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"first.log", "second.log"}
    assert (tmp_path / "logs" / "first.log").read_text() == "== stage ../../outside (adapt)\n"


def test_what_a_rank_says_is_the_reason_whichever_it_is(tmp_path):
    """Rank 0 may only have lost the one that ran out of memory."""
    with Log(tmp_path / "logs", "first") as log:
        log.write(b"[rank 0] the connection to another rank was lost (Connection closed by peer)\n")
        log.write(
            b"[rank 1] minima: OutOfMemory: stages.x: CUDA out of memory\n  why it matters: ...\nminima: Late: y\n"
        )
    assert log.error == "[rank 1] OutOfMemory: stages.x: CUDA out of memory"
