"""Which jobs are submitted, in which order, and what is refused before any is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minima.cluster import queued
from minima.cluster import submit as cluster_submit
from minima.cluster.jobs import read_jobs
from minima.cluster.submit import submit
from minima.errors import ClusterError, RecipeError, StageError
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.stages import identity
from minima.stages.identity import describe
from minima.stages.lock import run_lock
from tests.unit.cli.test_console import unread
from tests.unit.cluster.conftest import SHAPE, finish

RUN = Path("runs/test")


def send(*overrides: str, names=None, dry_run=False) -> str:
    said: list[str] = []
    assert submit(Path("recipe.yaml"), overrides, Path("cluster.yaml"), names, None, dry_run, said.append) == 0
    return "\n".join(said)


def test_one_job_for_each_stage_after_the_one_before_it(slurm, project):
    said = send()
    calls = slurm.calls("sbatch")
    assert [Path(call[-1]).name for call in calls] == ["corpus.sbatch", "base.sbatch", "out.sbatch"]
    assert not any("--dependency" in word for word in calls[0])
    assert {"--dependency=afterok:101", "--kill-on-invalid-dep=yes"} < set(calls[1])
    assert "--dependency=afterok:102" in calls[2]
    assert [(job.id, job.stage, job.ranks, job.after) for job in read_jobs(RUN)] == [
        ("101", "corpus", 1, []),
        ("102", "base", 4, ["101"]),
        ("103", "out", 1, ["102"]),
    ]
    assert "base: job 102, 4 ranks on 2 nodes, after 101" in said
    assert (RUN / "logs").is_dir()


def test_a_chain_is_whole_though_nobody_reads_what_is_said(slurm, project):
    assert unread(["submit", "recipe.yaml", "--cluster", "cluster.yaml"], project) == (0, "")
    assert [job.id for job in read_jobs(RUN)] == ["101", "102", "103"]
    answer_queue(slurm, "102 RUNNING base None", "103 PENDING out Dependency")
    assert unread(["cancel", str(RUN)], project) == (0, "")
    assert [call[-1] for call in slurm.calls("scancel")] == ["103", "102"]


def test_submitted_again_what_is_missing(slurm, project):
    send()
    finish(RUN, "corpus")
    slurm.answer(squeue="103|N/A|PENDING|test.out|Dependency")
    said = send(names=["corpus", "base", "out"])
    assert "corpus: finished" in said and "out: job 103 is in the queue" in said
    assert [Path(call[-1]).name for call in slurm.calls("sbatch")][3:] == ["base.sbatch"]
    assert "--dependency=afterany:103" in slurm.calls("sbatch")[3]  # one job at a time writes into the run's folder


def answer_queue(slurm, *tasks: str) -> None:
    """What squeue shows: `ID STATE STAGE REASON` of each."""
    rows = [task.split() for task in tasks]
    slurm.answer(squeue="\n".join(f"{job}|N/A|{state}|test.{stage}|{reason}" for job, state, stage, reason in rows))


@pytest.mark.parametrize(
    ("failed", "base", "out"),
    [
        ("FAILED", "Dependency", "Dependency"),  # Slurm has not looked yet
        ("TIMEOUT", "DependencyNeverSatisfied", "Dependency"),
        ("CANCELLED", "DependencyNeverSatisfied", "DependencyNeverSatisfied"),
    ],
)
def test_jobs_that_wait_for_one_that_failed_are_gone(slurm, project, failed, base, out):
    send()
    answer_queue(slurm, f"101 {failed} corpus None", f"102 PENDING base {base}", f"103 PENDING out {out}")
    assert "in the queue" not in send()
    again = slurm.calls("sbatch")[3:]
    assert [Path(call[-1]).stem for call in again] == ["corpus", "base", "out"]
    assert not any("--dependency" in word for word in again[0])
    assert "--dependency=afterok:104" in again[1] and "--dependency=afterok:105" in again[2]


def test_a_job_that_waits_for_what_runs_or_has_succeeded_is_not_gone(slurm, project):
    send()
    answer_queue(slurm, "101 COMPLETED corpus None", "102 RUNNING base None", "103 PENDING out Dependency")
    finish(RUN, "corpus")
    assert "nothing to submit" in send()


def test_a_missing_stage_waits_for_the_success_of_earlier_stages_alone(slurm, project):
    send()
    answer_queue(slurm, "101 RUNNING corpus None", "103 PENDING out Resources")
    send()
    [again] = slurm.calls("sbatch")[3:]
    assert "--dependency=afterok:101,afterany:103" in again and read_jobs(RUN)[-1].after == ["101"]


def test_everything_is_in_the_queue(slurm, project):
    send()
    queue = [("101", "RUNNING", "corpus"), ("102", "PENDING", "base"), ("103", "PENDING", "out")]
    slurm.answer(squeue="\n".join(f"{job}|N/A|{state}|test.{stage}|None" for job, state, stage in queue))
    assert "nothing to submit" in send()
    assert len(slurm.calls("sbatch")) == 3


def test_a_job_of_somebody_else_that_has_got_the_id(slurm, project):
    send()
    slurm.answer(squeue="101|N/A|RUNNING|their.job|None")
    send()
    assert len(slurm.calls("sbatch")) == 6


def test_squeue_that_has_forgotten_the_jobs(slurm, project):
    send(names=["corpus"])
    slurm.answer(squeue="error slurm_load_jobs error: Invalid job id specified")
    send()
    assert len(slurm.calls("sbatch")) == 4


def test_squeue_that_does_not_answer_submits_nothing_twice(slurm, project):
    send()
    slurm.answer(squeue="error Unable to contact slurm controller")
    with pytest.raises(ClusterError, match="Unable to contact"):
        send()
    assert len(slurm.calls("sbatch")) == 3


def test_a_refusal_in_the_middle_keeps_what_was_submitted(slurm, project):
    slurm.answer(sbatch="--fail 2")
    with pytest.raises(ClusterError, match=r"stage base: .*invalid partition"):
        send()
    assert [job.stage for job in read_jobs(RUN)] == ["corpus"]


def test_a_dry_run_submits_and_writes_nothing(slurm, project):
    before = sorted(project.rglob("*"))
    said = send(dry_run=True)
    assert said.count("#!/usr/bin/env bash") == 3 and not slurm.calls("sbatch")
    assert sorted(project.rglob("*")) == before


def test_a_batch_that_the_ranks_of_its_stage_cannot_share(slurm, project):
    cluster = {"stages": {"adapt": {"nodes": 3}}}
    Path("cluster.yaml").write_text(yaml.safe_dump(cluster))
    with pytest.raises(RecipeError, match="is not divisible by 3 ranks"):
        send()
    assert not slurm.calls("sbatch")


def test_an_input_that_is_neither_finished_nor_queued(slurm, project):
    with pytest.raises(StageError, match="not finished"):
        send(names=["out"])
    send(names=["corpus", "base"])
    slurm.answer(squeue="101|N/A|RUNNING|test.corpus|None\n102|N/A|PENDING|test.base|Dependency")
    send(names=["out"])
    assert "--dependency=afterok:101:102" in slurm.calls("sbatch")[-1]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_change_for_a_stage_whose_job_is_in_the_queue_is_refused(slurm, project, state):
    send()
    answer_queue(slurm, "101 RUNNING corpus None", f"102 {state} base Dependency", "103 PENDING out Dependency")
    with pytest.raises(
        ClusterError, match=rf"(?s)'base': job 102 \({state}\) .*steps 100, not 7.*minima cancel runs/te"
    ):
        send("stages.base.steps=7")
    with pytest.raises(ClusterError, match="job 103"):  # it would come from something else than was meant
        send("stages.out.dtype=float32", names=["corpus"])
    said = send("stages.base.log_every_steps=7")  # the result is the same
    assert "warning: stage 'base': job 102" in said and "keeps log_every_steps" in said and ", not 7" in said
    assert "warning" not in send() and len(slurm.calls("sbatch")) == 3


def test_a_change_of_the_cluster_file_for_a_job_in_the_queue_is_told(slurm, project):
    cluster = yaml.safe_load(Path("cluster.yaml").read_text())
    send()
    answer_queue(slurm, "101 RUNNING corpus None", "102 PENDING base Dependency", "103 PENDING out Dependency")
    assert "warning" not in send()
    cluster["stages"]["adapt"]["cpus_per_task"] = 4
    cluster["preamble"] = ["module load cuda"]
    Path("cluster.yaml").write_text(yaml.safe_dump(cluster))
    said = send()
    assert "stage 'base': job 102 (PENDING) keeps cpus_per_task 3, not 4: it was submitted with that" in said
    assert said.count("cpus_per_task") == 1 and said.count('keeps preamble [], not ["module load cuda"]') == 3
    assert "keeps flags" in send_with_code()
    assert len(slurm.calls("sbatch")) == 3


def send_with_code() -> str:
    said: list[str] = []
    submit(Path("recipe.yaml"), [], Path("cluster.yaml"), None, None, False, said.append, allow_code_execution=True)
    return "\n".join(said)


def queued_with(slurm, **changes):
    """Submit with a changed `base`, which is in the queue from then on."""
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["stages"][1] |= changes
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    send()
    answer_queue(slurm, "101 RUNNING corpus None", "102 PENDING base Dependency", "103 PENDING out Dependency")


def test_with_patience_it_matters_when_the_queued_job_evaluates(slurm, project):
    queued_with(slurm, patience=2, evaluate_every_steps=10)
    with pytest.raises(ClusterError, match="evaluate_every_steps 10, not 20"):
        send("stages.base.evaluate_every_steps=20")


def test_when_a_queued_job_evaluates_and_how_it_cuts_its_batch_does_not_matter(slurm, project):
    queued_with(slurm, evaluate_every_steps=10, micro_batch_sequences=2)
    said = send("stages.base.evaluate_every_steps=20", "stages.base.micro_batch_sequences=1")
    assert "keeps micro_batch_sequences 2, not 1" in said and "keeps evaluate_every_steps 10, not 20" in said


def test_where_the_teacher_of_a_queued_job_lives_does_not_matter(slurm, project):
    queued_with(slurm, kind="distil", teacher={"random": SHAPE, "placement": "replica"})
    said = send("stages.base.teacher.placement=zero3")
    assert 'job 102 (PENDING) keeps teacher.placement "replica", not "zero3": it reads' in said
    change = "stages.base.teacher.random.num_layers=3"
    with pytest.raises(ClusterError, match=r"with teacher\.random\.num_layers 2, not 3\n"):
        send(change)


def test_two_long_values_that_differ_at_their_ends_are_shown_whole(slurm, project):
    paths = [f"{'x' * 100}{number}.txt" for number in (1, 2)]
    for path in paths:
        Path(path).write_text("one text\n")
    overrides = [f"stages.corpus.sources=[{{path: {path}}}]" for path in paths]
    send(overrides[0])
    answer_queue(slurm, "101 PENDING corpus None")
    with pytest.raises(ClusterError) as caught:
        send(overrides[1])
    assert all(path in str(caught.value) for path in paths)


def test_what_a_queued_job_has_not_begun_is_not_hashed(slurm, project, monkeypatch):
    queued_with(slurm)
    hashed = []

    def count(recipe, stage, run_folder, planned=None):
        hashed.append(stage.name)
        return describe(recipe, stage, run_folder, planned)

    monkeypatch.setattr(queued, "describe", count)
    monkeypatch.setattr(identity, "describe", count)
    monkeypatch.setattr(cluster_submit, "check_jobs", lambda *given: [])  # which hashes for itself
    send()
    assert hashed == []
    loaded = load_recipe(Path("recipe.yaml"))
    for name in ("base", "out"):
        (RUN / name).mkdir()
        (RUN / name / "started.json").write_text(json.dumps(describe(loaded, loaded.stage(name), RUN, {})))
        (RUN / name / "part").touch()
    (RUN / "recipe.yaml").write_text(resolved_yaml(loaded))
    hashed.clear()
    send()
    assert hashed.count("corpus") == 1, "base and out read it, and its text is long"


def test_a_changed_json_for_a_stage_whose_job_is_in_the_queue(slurm, project):
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["stages"][1]["deepspeed"] = "mine.json"
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    Path("mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    send()
    answer_queue(slurm, "101 RUNNING corpus None", "102 PENDING base Dependency", "103 PENDING out Dependency")
    assert "warning" not in send()
    Path("mine.json").write_text('{"zero_optimization": {"stage": 3, "overlap_comm": true}}')
    assert "job 102 (PENDING) keeps deepspeed" in send()


def test_a_folder_whose_job_runs_is_not_to_be_removed_before_the_job_ends(slurm, project):
    Path("text.txt").write_text("one text\n")
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["stages"][0]["sources"] = [{"path": "text.txt"}]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    send()
    loaded = load_recipe(Path("recipe.yaml"))
    (RUN / "corpus").mkdir()
    (RUN / "recipe.yaml").write_text(resolved_yaml(loaded))
    (RUN / "corpus" / "started.json").write_text(json.dumps(describe(loaded, loaded.stage("corpus"), RUN)))
    (RUN / "corpus" / "part").touch()
    answer_queue(slurm, "101 RUNNING corpus None", "102 PENDING base Dependency", "103 PENDING out Dependency")
    send()
    Path("text.txt").write_text("another text\n")
    with pytest.raises(StageError, match=r"what to do: job 101 \(RUNNING\) .*`minima cancel runs/test`; then remove"):
        send()


def test_the_jobs_read_the_recipe_as_it_was_submitted(slurm, project):
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["stages"][1]["deepspeed"] = "mine.json"
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    Path("mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    send("stages.base.steps=7")
    slurm.job(RUN / "cluster" / "base.sbatch").communicate()
    [arguments] = slurm.calls("srun")
    copy = Path(arguments[arguments.index("stage") + 1])
    assert arguments[-3:] == ["--stages", "base", "stages.base.steps=7"]
    assert copy.read_text() == Path("recipe.yaml").read_text()
    assert (copy.parent / "ds_configs" / "mine.json").is_file()
    Path("mine.json").write_text('{"zero_optimization": {"stage": 3, "overlap_comm": true}}')
    send("stages.base.steps=7")
    assert len(list((RUN / "cluster" / "recipes").iterdir())) == 2  # the first is as its jobs left it


def test_the_last_job_writes_the_summary(slurm, project):
    send()
    slurm.job(RUN / "cluster" / "out.sbatch").communicate()
    first, second = slurm.calls("srun")
    assert first[-5:-2] == ["minima", "stage", second[-3]] and first[-1] == "out"
    assert second[-4:-2] == ["run", first[-3]] and second[-1] == "out"
    assert "--ntasks=1" in second
    assert len(slurm.calls("srun")) == 2


def test_data_shared_out_to_an_array_of_jobs(slurm, project):
    Path("cluster.yaml").write_text(yaml.safe_dump({"stages": {"build_data": {"array": 4, "array_limit": 2}}}))
    send()
    calls = slurm.calls("sbatch")
    assert [Path(call[-1]).name for call in calls] == [
        "corpus.parts.sbatch",
        "corpus.merge.sbatch",
        "base.sbatch",
        "out.sbatch",
    ]
    assert "--dependency=afterok:101" in calls[1] and "--dependency=afterok:102" in calls[2]
    parts = (RUN / "cluster/corpus.parts.sbatch").read_text()
    assert "#SBATCH --array=0-3%2\n" in parts and "corpus-%A_%a.log" in parts
    slurm.job(RUN / "cluster/corpus.parts.sbatch", SLURM_ARRAY_JOB_ID="101", SLURM_ARRAY_TASK_ID="3").communicate()
    slurm.job(RUN / "cluster/corpus.merge.sbatch").communicate()
    part, merge = slurm.calls("srun")
    assert part[-2:] == ["--part", "3/4"] and "--part" not in merge


def test_tokens_and_the_launcher_of_the_shell(slurm, project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("RANK", "3")
    send()
    entries = slurm.entries("sbatch")
    assert {entry["token"] for entry in entries} == {"hf_verysecret"}  # inherited
    assert {entry["rank"] for entry in entries} == {None}  # or every job would take itself for rank 3
    assert "verysecret" not in json.dumps([entry["arguments"] for entry in entries])
    written = [path for path in RUN.rglob("*") if path.is_file()]
    assert any(path.suffix == ".sbatch" for path in written)
    assert not [path for path in written if "verysecret" in path.read_text()]


def test_variables_of_the_shell_do_not_beat_the_cluster_file(slurm, project, monkeypatch):
    """What stands in #SBATCH lines does not hold against SBATCH_*; what stands on the command line does."""
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    Path("cluster.yaml").write_text(yaml.safe_dump({"partition": "gpu", "time": "01:00:00"}))
    send()
    for call, stage in zip(slurm.calls("sbatch"), ("corpus", "base", "out"), strict=True):
        asked = {"--partition=gpu", "--time=01:00:00", f"--job-name=test.{stage}", "--export=ALL", "--requeue"}
        assert asked | {"--signal=B:USR1@300", "--open-mode=append"} < set(call)
        script = Path(call[-1]).read_text()
        assert all(f"#SBATCH {option}\n" in script for option in asked), "for who submits it by hand"


@pytest.mark.parametrize(
    "override", ["output=runs/hf_" + "verysecret" * 3, "stages.base.wandb_project=http://me:verysecret@proxy:3128"]
)
def test_a_token_in_an_override_is_refused_and_not_repeated(slurm, project, override):
    with pytest.raises(ClusterError, match="overrides: ") as caught:
        send(override)
    assert "verysecret" not in str(caught.value) and not slurm.calls("sbatch")


@pytest.mark.parametrize("name", ["opus-en-sk-parallel-corpus-2024", "sk-minima-3b-student-distilled"])
def test_a_folder_that_only_looks_like_a_token(slurm, project, name):
    send(f"output=runs/{name}")
    assert len(slurm.calls("sbatch")) == 3


def test_a_token_in_a_comment_is_not_copied_into_the_runs_folder(slurm, project):
    with open("recipe.yaml", "a", encoding="utf-8") as file:
        file.write("\n# export HF_TOKEN=hf_VerySecret0VerySecret1VerySecret2VS\n")
    with pytest.raises(ClusterError, match=r"recipe\.yaml has what looks like a token .*in a comment") as refused:
        send()
    assert "VerySecret" not in str(refused.value) and not slurm.calls("sbatch")
    assert not (RUN / "cluster" / "recipes").exists()


def test_a_job_that_is_held_since_its_reservation_is_gone_is_in_the_queue(slurm, project):
    send()
    answer_queue(slurm, "101 RESV_DEL_HOLD corpus ReservationDeleted", "102 PENDING base Dependency",
                 "103 PENDING out Dependency")  # fmt: skip
    assert "nothing to submit" in send()
    assert len(slurm.calls("sbatch")) == 3


def test_a_save_and_two_steps_that_take_longer_than_the_signals_lead(slurm, project):
    marker = RUN / "base/checkpoints/step-00000010/checkpoint.json"
    marker.parent.mkdir(parents=True)
    (RUN / "recipe.yaml").write_text(Path("recipe.yaml").read_text())
    marker.write_text(json.dumps({"step": 10, "save_seconds": 20.0}))
    record = {"step": 10, "loss": 2.0, "tokens": 1000, "tokens_per_second": 1.0}
    (RUN / "base" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert "signal_lead_seconds" not in send()
    (RUN / "base" / "metrics.jsonl").write_text(json.dumps(record | {"tokens_per_second": 0.5}) + "\n")
    said = send()
    assert "took 20 s and two steps 400 s" in said and "set signal_lead_seconds to 500 or more" in said


def test_a_save_that_takes_longer_than_the_signals_lead(slurm, project):
    marker = RUN / "base/checkpoints/step-00000010/checkpoint.json"
    marker.parent.mkdir(parents=True)
    Path("cluster.yaml").write_text(yaml.safe_dump({"partition": "gpu"}))
    (RUN / "recipe.yaml").write_text(Path("recipe.yaml").read_text())
    marker.write_text(json.dumps({"step": 10, "save_seconds": 20.0}))
    slurm.answer(scontrol_show_partition="PartitionName=gpu GraceTime=10 PreemptMode=REQUEUE")
    said = send()
    assert "GraceTime=10" in said and "signal_lead_seconds" not in said
    marker.write_text(json.dumps({"step": 10, "save_seconds": 400.0}))
    assert "set signal_lead_seconds to 860 or more" in send()


def test_another_working_directory(slurm, project, tmp_path):
    Path("cluster.yaml").write_text(yaml.safe_dump({"working_directory": str(tmp_path)}))
    with pytest.raises(ClusterError, match="submit from there"):
        send()
    Path("cluster.yaml").write_text(yaml.safe_dump({"working_directory": str(project)}))
    send()


def test_an_entry_for_no_stage(slurm, project):
    Path("cluster.yaml").write_text(yaml.safe_dump({"stages": {"bas": {"nodes": 2}}}))
    assert "stages.bas is neither a kind nor a stage of this recipe; did you mean 'base'?" in send()


def test_a_virtual_environment_that_is_not_here(slurm, project):
    Path("cluster.yaml").write_text(yaml.safe_dump({"venv": "env"}))
    assert f"warning: {project / 'env' / 'bin' / 'activate'} does not exist" in send()
    (project / "env" / "bin").mkdir(parents=True)
    (project / "env" / "bin" / "activate").touch()
    assert "activate does not exist" not in send()


def test_two_submissions_at_once(slurm, project):
    with run_lock(RUN / "cluster"), pytest.raises(StageError, match="is in use"):
        send()


def test_without_slurm(project, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="sbatch is not on this machine"):
        send()


def test_a_login_node_needs_no_torch():
    code = "import sys, minima.cluster.submit, minima.cluster.grid, minima.cluster.status, minima.cluster.cancel\n"
    code += "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("allowed", [False, True])
def test_code_that_a_model_wrote_is_executed_only_where_the_person_allows_it(slurm, project, allowed):
    said: list[str] = []
    assert submit(Path("recipe.yaml"), [], Path("cluster.yaml"), None, None, True, said.append, allowed) == 0
    commands = [line for line in "\n".join(said).splitlines() if " -m minima stage " in line]
    assert len(commands) == 3 and all(("--allow-code-execution" in line) == allowed for line in commands)


def test_gpus_that_a_stage_does_not_use_are_told(slurm, project):
    cluster = {"time": "01:00:00", "defaults": {"gpus_per_node": 8}}
    Path("cluster.yaml").write_text(yaml.safe_dump(cluster | {"stages": {"build_data": {"array": 4}}}))
    said = send()
    assert "stage 'corpus' requests 8 GPUs in each of its 4 jobs but uses none" in said
    assert "stage 'base' asks" not in said
    Path("cluster.yaml").write_text(yaml.safe_dump(cluster | {"stages": {"build_data": {"gpus_per_node": 0}}}))
    assert "uses none" not in send(dry_run=True)
