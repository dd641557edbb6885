"""How lm-eval is started and what is kept of it, with a stand-in for lm-eval. The real one: tests/pipeline."""

import json
import os
import sys

import pytest
import yaml

from minima.errors import StageError
from minima.evaluation import harness
from minima.evaluation.harness import Call, Settings, ask, check_code_execution, command, configuration

CALL = Call("mmlu", ("mmlu",), 5)
STAND_IN = """
import json, os, pathlib, sys, yaml
asked = yaml.safe_load(open(sys.argv[1]))
open(sys.argv[2], "a").write(json.dumps(dict(os.environ)) + "\\n")
print("progress", end="\\r")
print("confirm_run_unsafe_code=", asked["confirm_run_unsafe_code"])  # lm-eval shows all that it was told
print("some warning", file=sys.stderr)
if len(sys.argv) > 3:
    print(sys.argv[3])
    sys.exit(int(sys.argv[4]))
out = pathlib.Path(asked["output_path"]) / "__a__model"
out.mkdir(parents=True)
(out / "results_2026-01-01T00-00-00.1.json").write_text(json.dumps({"results": {"mmlu": {"acc,none": 0.25}}}))
(out / "samples_mmlu_x_2026-01-01T00-00-00.1.jsonl").write_text("{}")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes the child a script; gives a function that sets how it ends, and where it writes its environment."""
    script, environments = tmp_path / "stand_in.py", tmp_path / "environments"
    script.write_text(STAND_IN)

    def start(*ending: str):
        monkeypatch.setattr(
            harness, "command", lambda path: [sys.executable, str(script), str(path), str(environments), *ending]
        )
        return environments

    return start


def settings(tmp_path, **options):
    return Settings(tmp_path / "model", **options)


def test_the_answer_and_what_belongs_to_it_are_kept(tmp_path, stand_in, capsys):
    started = stand_in()
    folder = tmp_path / "lm_eval"
    assert ask(CALL, settings(tmp_path), folder) == {"results": {"mmlu": {"acc,none": 0.25}}}
    assert sorted(path.name for path in folder.iterdir()) == ["mmlu"]
    assert sorted(path.name for path in (folder / "mmlu").iterdir()) == [
        "configuration.yaml", "lm_eval.log", "results.json", "samples_mmlu_x.jsonl",
    ]  # fmt: skip
    assert "some warning" in capsys.readouterr().out  # the run's log gets what the child said
    ask(CALL, settings(tmp_path), folder)
    assert len(started.read_text().splitlines()) == 1  # an earlier start's answer is not asked for again


def test_nothing_of_our_launcher_reaches_the_child(tmp_path, stand_in, monkeypatch):
    ours = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1",
            "OMPI_COMM_WORLD_RANK": "0", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_USE_DEEPSPEED": "true",
            "MINIMA_RANKS": "2", "MINIMA_DRIVER": "1"}  # fmt: skip
    for name, value in (ours | {"HF_ALLOW_CODE_EVAL": "1", "HF_HUB_OFFLINE": "1"}).items():
        monkeypatch.setenv(name, value)
    started = stand_in()
    ask(CALL, settings(tmp_path), tmp_path / "a")
    ask(CALL, settings(tmp_path, allow_code_execution=True), tmp_path / "b")
    without, allowed = map(json.loads, started.read_text().splitlines())
    assert not set(ours) & set(without)
    assert without["HF_HUB_OFFLINE"] == "1"  # the person's own settings stay
    assert (without["HF_ALLOW_CODE_EVAL"], allowed["HF_ALLOW_CODE_EVAL"]) == ("0", "1")
    assert os.environ["RANK"] == "0"


def test_a_failure_tells_the_end_of_the_log_and_leaves_nothing(tmp_path, stand_in):
    stand_in("ValueError: Tasks not found: mmlu", "3")
    folder = tmp_path / "lm_eval"
    with pytest.raises(StageError, match="exit code 3 on mmlu") as raised:
        ask(CALL, settings(tmp_path), folder)
    assert "ValueError: Tasks not found: mmlu" in str(raised.value)
    assert [path.name for path in folder.iterdir()] == [".mmlu.partial"]  # with the log that the message names
    stand_in()
    assert ask(CALL, settings(tmp_path), folder)
    assert [path.name for path in folder.iterdir()] == ["mmlu"]


def test_what_one_of_several_processes_raised(tmp_path, stand_in):
    """accelerate closes the log with an error of its own, which says only that there was one."""
    said = "[rank1]: torch.OutOfMemoryError: CUDA out of memory\nTraceback (most recent call last):\n"
    stand_in(said + "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\nlm_eval FAILED", "1")
    with pytest.raises(StageError, match=r"exit code 1 on mmlu: torch\.OutOfMemoryError: CUDA out of memory"):
        ask(CALL, settings(tmp_path), tmp_path / "lm_eval")


def test_an_end_without_results_is_a_failure_too(tmp_path, stand_in):
    stand_in("Could not save results aggregated", "0")  # lm-eval says this, and exits with 0
    with pytest.raises(StageError, match="without a result"):
        ask(CALL, settings(tmp_path), tmp_path / "lm_eval")


def test_a_task_that_lm_eval_alone_knows_to_be_unsafe(tmp_path, stand_in):
    stand_in("ValueError: which is marked as unsafe. Set confirm_run_unsafe_code=True", "1")
    with pytest.raises(StageError, match=r"own_code_task would execute(.*\n)*.*--allow-code-execution"):
        ask(Call("tasks", ("own_code_task",)), settings(tmp_path), tmp_path / "lm_eval")


@pytest.mark.parametrize("task", ["humaneval", "humaneval_plus", "local_humaneval", "mbpp_instruct"])
def test_tasks_that_execute_code_need_leave(task):
    with pytest.raises(StageError, match=rf"{task} would execute.*(\n.*)*--allow-code-execution"):
        check_code_execution(["mmlu", task], allowed=False)
    check_code_execution(["mmlu", task], allowed=True)


def test_what_lm_eval_is_told(tmp_path):
    chosen = settings(tmp_path, dtype="bfloat16", limit=3, chat=True, seed=7, batch_size=2, task_folders=(tmp_path,))
    told = configuration(CALL, chosen, tmp_path / "out")
    assert yaml.safe_load(yaml.safe_dump(told)) == told
    assert told["model_args"] == {"pretrained": str(tmp_path / "model"), "dtype": "bfloat16"}
    assert (told["tasks"], told["num_fewshot"], told["limit"], told["batch_size"]) == (["mmlu"], 5, 3, 2)
    assert told["device"] == "cpu" and told["apply_chat_template"] and told["seed"] == [7] * 4
    assert told["include_path"] == [str(tmp_path)] and told["confirm_run_unsafe_code"] is False


def test_several_gpus_go_through_accelerate(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "num_accelerators", lambda: 1)
    assert command(tmp_path)[1:4] == ["-m", "lm_eval", "run"]
    monkeypatch.setattr(harness, "num_accelerators", lambda: 4)
    line = command(tmp_path)
    assert line[1:3] == ["-m", "accelerate.commands.launch"]
    assert line[line.index("--num_processes") + 1] == "4" and "--multi_gpu" in line
    assert line[-5:] == ["-m", "lm_eval", "run", "--config", str(tmp_path)]
    assert configuration(CALL, settings(tmp_path), tmp_path)["device"] == "cuda"


def test_accelerate_understands_the_line(monkeypatch, tmp_path):
    launch = pytest.importorskip("accelerate.commands.launch")
    monkeypatch.setattr(harness, "num_accelerators", lambda: 2)
    options = launch.launch_command_parser().parse_args(command(tmp_path)[3:])
    assert options.module and options.training_script == "lm_eval" and options.num_processes == 2
    assert options.training_script_args == ["run", "--config", str(tmp_path)]


def test_lm_eval_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"pip install lm-eval accelerate"):
        ask(CALL, settings(tmp_path), tmp_path / "lm_eval")


def test_answers_leave_room_for_the_question(tmp_path, monkeypatch):
    """lm-eval does not ask a model whose whole window is no longer than an answer may be; then it is told of half."""
    script = tmp_path / "stand_in.py"
    script.write_text(
        "import json, pathlib, sys, yaml\n"
        "asked = yaml.safe_load(open(sys.argv[1]))\n"
        "if 'gen_kwargs' not in asked:\n"
        '    sys.exit("AssertionError: Invalid configuration: requested max tokens to generate (256) must be less than '
        "model's maximum sequence length (128).\")\n"
        "out = pathlib.Path(asked['output_path']) / 'm'\n"
        "out.mkdir(parents=True)\n"
        "(out / 'results_1.json').write_text(json.dumps({'config': {'gen_kwargs': asked['gen_kwargs']}}))\n"
    )
    monkeypatch.setattr(harness, "command", lambda path: [sys.executable, str(script), str(path)])
    found = ask(CALL, settings(tmp_path), tmp_path / "lm_eval")
    assert found["config"]["gen_kwargs"] == {"max_gen_toks": 64}
    assert "gen_kwargs" not in configuration(CALL, settings(tmp_path), tmp_path)
