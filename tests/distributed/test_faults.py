"""What clusters do to runs, done to one run of two ranks again and again: in the end it equals an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minima.engine.checkpoint.store import verify_checkpoint
from minima.models.layout import complete_steps, step_folder
from tests.distributed.ranks import start_ranks

pytestmark = pytest.mark.ranks

STEPS = 60
RECIPE = f"""
name: faults
output: out
stages:
  - name: corpus
    kind: build_data
    sources: [{{path: text.jsonl}}]
    tokenizer: {{vocabulary_size: 300}}
    sequence_length: 16
    held_out_fraction: 0
    processes: 1
  - &disturbed
    name: disturbed
    kind: adapt
    model:
      random: {{vocabulary_size: 300, hidden_size: 32, intermediate_size: 48, num_layers: 2, num_heads: 4,
               max_positions: 32}}
    data: corpus
    batch_sequences: 8
    micro_batch_sequences: 2
    steps: {STEPS}
    learning_rate: 3e-3
    precision: float32
    checkpoint_every_steps: 5
    keep_checkpoints: 0
    log_every_steps: 1
    watchdog_seconds: 4
    tensorboard: false
  - {{<<: *disturbed, name: undisturbed}}
  - {{<<: *disturbed, name: full_disk, keep_checkpoints: 2}}
"""


class Run:
    """A run folder, and ranks that are started in it with faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        words = ["the", "state", "of", "union", "is", "strong", "and", "people", "it", "are", "free", "to", "go"]
        lines = [{"text": " ".join(words[i % 13 :] + words[: i % 7]) + f" {i}."} for i in range(400)]
        (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "faults.yaml").write_text(RECIPE)

    def start(self, stages: str, **faults) -> list[subprocess.Popen]:
        module = ["tests.distributed.fault_rank", json.dumps(faults), "faults.yaml", "--stages", stages]
        return start_ranks(module, self.folder, self.folder)

    def end(self, ranks: list[subprocess.Popen], seconds: float = 120) -> tuple[list[int], str]:
        """Exit codes of the ranks, the others killed once one has failed, as launchers do; and what they said."""
        until = time.monotonic() + seconds
        failed_at = None
        while any(rank.poll() is None for rank in ranks):
            if failed_at is None and any(rank.poll() not in (None, 0) for rank in ranks):
                failed_at = time.monotonic()
            if time.monotonic() > until or (failed_at is not None and time.monotonic() > failed_at + 5):
                for rank in ranks:
                    rank.kill()
            time.sleep(0.05)
        return [rank.wait() for rank in ranks], self.said()

    def said(self) -> str:
        return "\n".join((self.folder / f"rank-{rank}.log").read_text() for rank in range(2))

    def records(self, stage: str = "disturbed") -> dict[int, float]:
        path = self.out / stage / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return {record["step"]: record["loss"] for record in map(_json, lines) if "loss" in record}

    def wait_for(self, ranks: list[subprocess.Popen], what) -> None:
        until = time.monotonic() + 120
        while not what():
            assert all(rank.poll() is None for rank in ranks) and time.monotonic() < until, self.said()[-4000:]
            time.sleep(0.01)

    def wait_for_step(self, ranks: list[subprocess.Popen], step: int, stage: str = "disturbed") -> None:
        self.wait_for(ranks, lambda: max(self.records(stage), default=0) >= step)

    def checkpoints(self, stage: str = "disturbed") -> Path:
        return self.out / stage / "checkpoints"


def _json(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:  # being written just now
        return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole story; each test looks at one part of it."""
    run = Run(tmp_path_factory.mktemp("faults"))
    run.codes, run.texts, run.facts = {}, {}, {}

    def end(name, ranks):
        run.codes[name], run.texts[name] = run.end(ranks)

    end("undisturbed", run.start("corpus,undisturbed"))

    ranks = run.start("disturbed", step_seconds=0.05)
    run.wait_for_step(ranks, 12)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)  # however long the second job takes, the first makes no step meanwhile
    second = [sys.executable, "-m", "minima", "stage", "faults.yaml", "--stages", "disturbed"]
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
    run.facts["second_job"] = subprocess.run(second, cwd=run.folder, env=environment, capture_output=True, text=True)
    run.facts["holder"] = ranks[0].pid
    ranks[1].kill()
    ranks[0].send_signal(signal.SIGCONT)
    end("killed_in_a_step", ranks)
    run.facts["steps_killed_in_a_step"] = complete_steps(run.checkpoints())

    ranks = run.start("disturbed", step_seconds=0.05, slow_save_step=20)
    run.wait_for(ranks, lambda: any(run.checkpoints().glob("step-00000020.partial/weights-*")))
    ranks[0].kill()
    end("killed_in_a_save", ranks)
    run.facts["partial"] = sorted(path.name for path in run.checkpoints().iterdir())[-1]

    newest, before = (step_folder(run.checkpoints(), step) for step in (15, 10))
    with open(next(newest.glob("weights-00001*")), "r+b") as file:
        file.truncate(100)
    damaged = next(before.glob("exp_avg-00000*"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    ranks = run.start("disturbed", step_seconds=0.05, clock_back_step=20)
    run.wait_for_step(ranks, 23)
    ranks[1].send_signal(signal.SIGTERM)  # one rank is enough
    end("terminated", ranks)
    run.facts["steps_terminated"] = complete_steps(run.checkpoints())
    run.facts["steps_logged_terminated"] = max(run.records())

    ranks = run.start("disturbed", step_seconds=0.02, hang=[1, 37])
    began = time.monotonic()
    run.wait_for_step(ranks, 36)
    began = time.monotonic()
    end("hung", ranks)
    run.facts["hung_seconds"] = time.monotonic() - began

    ranks = run.start("disturbed", step_seconds=0.02)
    run.wait_for_step(ranks, 42)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP if rank is ranks[0] else signal.SIGCONT)
    end("stopped", ranks)

    end("nan", run.start("disturbed", nan_step=48))

    shard = next((run.out / "corpus" / "train").glob("*.bin"))
    whole, run.facts["shard"] = shard.read_bytes(), shard
    for name, content in (("flipped", whole[:-1] + bytes([whole[-1] ^ 1])), ("missing", None)):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        end(name, run.start("disturbed"))
        shard.write_bytes(whole)
    recipe = run.folder / "faults.yaml"
    recipe.write_bytes(RECIPE.encode()[:-20] + b"\xff: [")
    end("unreadable", run.start("disturbed"))
    recipe.write_text(RECIPE)
    run.facts["steps_after_damage"] = complete_steps(run.checkpoints())
    end("finished", run.start("disturbed"))
    return run


def test_one_writer_and_it_is_named(run):
    second = run.facts["second_job"]
    assert second.returncode == 2
    assert f"is in use by process {run.facts['holder']} on " in second.stderr


def test_a_rank_killed_in_a_step_loses_what_came_after_the_last_checkpoint(run):
    codes = run.codes["killed_in_a_step"]
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert run.facts["steps_killed_in_a_step"] == [5, 10]


def test_a_rank_killed_in_a_save_leaves_nothing_that_counts(run):
    assert run.codes["killed_in_a_save"][0] == -signal.SIGKILL
    assert run.facts["partial"] == "step-00000020.partial"
    assert "resuming after step 10" in run.texts["killed_in_a_save"]


def test_damaged_checkpoints_are_named_and_passed_over(run):
    text = run.texts["terminated"]
    assert "step-00000015/weights-00001-of-00002.safetensors is damaged" in text
    assert "step-00000010/exp_avg-00000-of-00002.safetensors is damaged" in text
    assert "resuming after step 5\n" in text
    kept = {path.name for path in run.checkpoints().iterdir()}
    assert {"step-00000015.damaged", "step-00000010.damaged"} <= kept, "nothing is thrown away"


def test_a_signal_to_one_rank_saves_on_all_and_loses_no_step(run):
    assert run.codes["terminated"] == [128 + signal.SIGTERM] * 2
    last = run.facts["steps_terminated"][-1]
    assert 23 <= last < STEPS and last == run.facts["steps_logged_terminated"]
    assert f"stopped by signal 15: step {last} of {STEPS} is saved" in run.texts["terminated"]
    assert f"resuming after step {last}\n" in run.texts["hung"]


def test_the_watchdog_names_a_rank_that_hangs_in_its_own_code(run):
    assert run.codes["hung"] == [4, 4]
    assert "RankHung: rank 1 on " in run.texts["hung"] and "step 37: reading its blocks" in run.texts["hung"]
    assert "slower_step" in run.texts["hung"], "its stack says where"
    assert run.facts["hung_seconds"] < 30


def test_the_watchdog_names_a_rank_that_gives_no_sign_of_life(run):
    assert run.codes["stopped"] == [-signal.SIGKILL, 4], "a launcher kills what cannot end"
    assert "RankHung: rank 0" in run.texts["stopped"] and "no sign of life" in run.texts["stopped"]


def test_a_loss_that_is_not_a_number_stops_before_the_update(run):
    assert run.codes["nan"] == [2, 2]
    assert "NotFinite: step 48" in run.texts["nan"]
    assert "resuming after step 45\n" in run.texts["finished"]


@pytest.mark.parametrize(("name", "how"), [("flipped", "has sha256"), ("missing", "is missing")])
def test_a_damaged_shard_of_the_data_is_named_before_anything_is_trained_on_it(run, name, how):
    assert run.codes[name] == [2, 2]
    assert f"{run.facts['shard'].name} {how}" in run.texts[name]
    assert max(run.facts["steps_after_damage"]) == 45, "nothing was trained, and nothing lost"


def test_a_recipe_that_cannot_be_read_touches_nothing(run):
    assert run.codes["unreadable"] == [2, 2]
    assert "the recipe faults.yaml cannot be read" in run.texts["unreadable"]


def test_after_all_of_it_the_run_equals_an_undisturbed_one_to_the_bit(run):
    assert run.codes["undisturbed"] == run.codes["finished"] == [0, 0]
    assert run.records() == run.records("undisturbed") and sorted(run.records()) == list(range(1, STEPS + 1))
    markers = [
        json.loads((step_folder(run.checkpoints(stage), STEPS) / "checkpoint.json").read_text())
        for stage in ("disturbed", "undisturbed")
    ]
    assert len(markers[0]["sha256"]) == 8 and markers[0]["sha256"] == markers[1]["sha256"]


def test_a_clock_that_goes_backwards_changes_nothing(run):
    manifest = json.loads((run.out / "disturbed" / "manifest.json").read_text())
    assert manifest["seconds"] > 0
    assert all(json.loads(line).get("tokens_per_second", 1) > 0
               for line in (run.out / "disturbed" / "metrics.jsonl").read_text().splitlines())  # fmt: skip


def _mount(*arguments: str) -> bool:
    for command in (["mount"], ["sudo", "-n", "mount"]):
        if shutil.which(command[0]) and subprocess.run([*command, *arguments], capture_output=True).returncode == 0:
            return True
    return False


def _unmount(folder: Path) -> None:
    if subprocess.run(["umount", str(folder)], capture_output=True).returncode:
        subprocess.run(["sudo", "-n", "umount", str(folder)], check=True)


def test_a_full_disk_in_a_save_is_named_and_the_run_goes_on_once_there_is_room(run):
    folder = run.checkpoints("full_disk")
    folder.mkdir(parents=True)
    marker = step_folder(run.checkpoints("undisturbed"), 5)
    size = sum(path.stat().st_size + 4096 for path in marker.iterdir())
    if not _mount("-t", "tmpfs", "-o", f"size={2 * size + size // 2}", "tmpfs", str(folder)):
        assert "CI" not in os.environ, "continuous integration has to be able to mount a small tmpfs"
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        codes, text = run.end(run.start("full_disk"))
        assert codes == [2, 2] and "DiskFull: no space left for" in text, text[-3000:]
        assert complete_steps(folder) == [5, 10]
        for step in (5, 10):
            verify_checkpoint(step_folder(folder, step))
        assert _mount("-o", f"remount,size={20 * size}", str(folder))
        codes, text = run.end(run.start("full_disk"))
        assert codes == [0, 0] and "resuming after step 10\n" in text, text[-3000:]
        assert run.records("full_disk") == run.records("undisturbed")
        assert complete_steps(folder) == [STEPS - 5, STEPS]
    finally:
        _unmount(folder)
