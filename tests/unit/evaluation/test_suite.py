"""What the suite asks, what becomes of lm-eval's numbers, and the task files that minima ships."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from minima.errors import StageError
from minima.evaluation.harness import Call
from minima.evaluation.suite import SUITE, Asked, file_hashes, plan_suite, plan_tasks, score, table, write_tasks
from minima.recipe.release import SUITE_NAMES

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "minima" / "assets" / "tasks"
PAPER_SHOTS = {"mmlu": 5, "ceval": 5, "drop": 3, "humaneval": 0, "bbh": 3, "gsm8k": 8}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path):
    for entry in SUITE:
        for name in entry.files:
            path = tmp_path / "data" / (f"{name}/anatomy/test.jsonl" if "." not in name else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")
    return tmp_path / "data"


def test_the_suite_is_what_the_paper_reports():
    asked, left_out = plan_suite(None, allow_code_execution=True)
    assert not left_out and {each.name: each.call.shots for each in asked} == PAPER_SHOTS
    assert tuple(entry.name for entry in SUITE) == SUITE_NAMES
    assert {entry.name: entry.paper for entry in SUITE}["gsm8k"] == (8.11, 29.72)
    assert [each.task for each in asked] == [
        "mmlu", "ceval-valid", "minima_drop", "humaneval", "minima_bbh", "gsm8k_cot",
    ]  # fmt: skip


def test_without_leave_humaneval_is_left_out():
    asked, left_out = plan_suite(None, allow_code_execution=False)
    assert left_out == ["humaneval"] and "humaneval" not in [each.name for each in asked]


def test_local_items_and_stand_ins_cannot_be_taken_for_each_other(data):
    asked, _ = plan_suite(data, allow_code_execution=True)
    assert [(each.name, each.stand_in) for each in asked] == [
        ("mmlu", False), ("ceval_stand_in", True), ("drop", False), ("humaneval", False), ("bbh_stand_in", True),
        ("gsm8k", False),
    ]  # fmt: skip
    assert [each.call.shots for each in asked] == list(PAPER_SHOTS.values())


def test_a_data_folder_without_items(data):
    (data / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(StageError, match=r"has no gsm8k/test.jsonl(.*\n)*.*fetch_benchmarks"):
        plan_suite(data, allow_code_execution=False)


def test_further_tasks_share_a_call():
    asked = plan_tasks(["arc_easy", "piqa"], 2, allow_code_execution=False)
    assert [each.name for each in asked] == ["arc_easy", "piqa"]
    assert {each.call for each in asked} == {Call("tasks", ("arc_easy", "piqa"), 2)}
    with pytest.raises(StageError, match="--allow-code-execution"):
        plan_tasks(["humaneval"], None, allow_code_execution=False)


RESULTS = {
    "results": {
        "a": {"alias": "a", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.2},
        "b": {"acc,none": 0.0, "acc_stderr,none": "N/A"},
    },
    "groups": {"g": {"acc,none": 0.3, "acc_stderr,none": 0.1, "acc_norm,none": 0.4}},
    "group_subtasks": {"g": ["a", "h"], "h": ["b"]},
    "versions": {"a": 1.0, "b": 2.0, "g": 3.0},
    "n-shot": {"a": 5, "b": 5},
    "n-samples": {"a": {"original": 30, "effective": 3}, "b": {"original": 2, "effective": 2}},
    "task_hashes": {"a": "aaa", "b": "bbb"},
}


def test_a_groups_numbers():
    found = score(Asked("g", "g", Call("g", ("g",))), RESULTS, limit=3)
    assert (found["score"], found["metric"], found["filter"], found["stderr"]) == (0.3, "acc", "none", 0.1)
    assert (found["items"], found["items_in_all"], found["limited"], found["shots"]) == (5, 32, True, 5)
    assert (found["version"], found["hashes"]) == (3.0, {"a": "aaa", "b": "bbb"})
    assert found["metrics"] == {"acc,none": 0.3, "acc_norm,none": 0.4}
    other = score(Asked("g", "g", Call("g", ("g",)), "acc_norm,none"), RESULTS, limit=None)
    assert (other["score"], other["stderr"]) == (0.4, None)


def test_a_data_folder_with_a_part_of_the_items_is_marked():
    entry = next(entry for entry in SUITE if entry.name == "drop")
    here = {**RESULTS["n-samples"], "local_drop": {"original": 1000, "effective": 1000}}
    numbers = RESULTS["results"] | {"local_drop": {"em,none": 0.1, "f1,none": 0.2}}
    results = RESULTS | {"results": numbers, "n-samples": here, "n-shot": {"local_drop": 3}}
    found = score(Asked("drop", "local_drop", Call("drop", ("local_drop",), 3), entry.metric, entry), results, None)
    assert (found["items"], found["items_in_all"], found["limited"]) == (1000, 9536, True)
    assert "limited: 1000 of 9536 items" in table({"drop": found})


def test_a_number_that_lm_eval_did_not_give():
    with pytest.raises(StageError, match=r"no pass@1,create_test for b \(it gave acc,none\)"):
        score(Asked("b", "b", Call("b", ("b",)), "pass@1,create_test"), RESULTS, None)
    with pytest.raises(StageError, match="no number for c"):
        score(Asked("c", "c", Call("c", ("c",))), RESULTS, None)


def test_the_table_says_what_a_number_is_not():
    entry = SUITE[0]
    real = score(Asked("mmlu", "a", Call("a", ("a",)), None, entry), RESULTS, 3)
    stand_in = score(Asked("ceval_stand_in", "b", Call("b", ("b",)), None, SUITE[1], stand_in=True), RESULTS, None)
    assert stand_in["paper"] is None and real["paper"]["MiniMA-3B"] == 28.51
    lines = table({"mmlu": real, "ceval_stand_in": stand_in}).splitlines()
    assert "28.5100" in lines[2] and "limited: 3 of 30 items" in lines[2] and "50.0000" in lines[2]
    assert "28.23" not in lines[3] and "hand-made items: not a benchmark score" in lines[3]
    assert "ANOTHER harness" in lines[-1] and "hendrycks/test" in lines[-1]


def test_task_files_are_filled_in(tmp_path, data):
    folder = write_tasks(tmp_path / "tasks", data)
    found = {path.name: yaml.load(path.read_text(), _Loader) for path in folder.glob("*.yaml")}
    assert "${" not in "".join(path.read_text() for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    assert found["local_mmlu.yaml"]["task"] == ["local_mmlu_anatomy"]
    read = 0
    for name, content in found.items():
        for include in [content["include"]] if isinstance(content.get("include"), str) else content.get("include", []):
            assert (folder / include).is_file(), (name, include)
        for file in content.get("dataset_kwargs", {}).get("data_files", {}).values():
            assert Path(file).is_relative_to(data) or Path(file).is_relative_to(folder), (name, file)
            assert Path(file).is_file() or name == "local_mmlu_anatomy.yaml", (name, file)  # which has no shots here
            read += 1
    assert read >= len(SUITE)
    for entry in SUITE:
        assert f"{entry.local}.yaml" in found
    assert not list(write_tasks(tmp_path / "hub", None).glob("local_*"))


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: node.value)


@pytest.mark.parametrize(
    ("name", "shots", "keys"),
    [
        ("stand_in_ceval", 0, {"question", "A", "B", "C", "D", "answer"}),
        ("stand_in_ceval_shots", 5, {"question", "A", "B", "C", "D", "answer"}),
        ("stand_in_bbh_boolean_expressions", 0, {"input", "target"}),
        ("stand_in_bbh_navigate", 0, {"input", "target"}),
        ("stand_in_bbh_object_counting", 0, {"input", "target"}),
    ],
)
def test_stand_ins(name, shots, keys):
    rows = [json.loads(line) for line in (ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= max(5, shots) and all(set(row) == keys for row in rows)
    if name.endswith("boolean_expressions"):
        assert all(str(eval(row["input"].removesuffix(" is"))) == row["target"] for row in rows)  # noqa: S307
    if name.endswith("navigate"):
        assert all(("Yes" if returns(row["input"]) else "No") == row["target"] for row in rows)


def returns(text: str) -> bool:
    """Walk."""
    place, heading = 0j, 1j
    side = {"forward": 1, "backward": -1, "left": 1j, "right": -1j}
    for step in text.partition("? ")[2].partition("\n")[0].split(". "):
        words = step.rstrip(".").split()
        if words[0] == "Turn":
            heading *= {"left": 1j, "right": -1j, "around": -1}[words[1]]
        elif words[0] == "Take":
            place += heading * int(words[1]) * side[words[3] if len(words) > 3 else "forward"]
    return place == 0


def test_the_continuation_items_are_what_the_tool_makes():
    tool = load(ROOT / "tools" / "make_continuation_task.py")
    for language, pairs, far in (("en", tool.sentences(), 3), ("zh", tool.verses(), 0)):
        lines = (ASSETS / f"continuation_{language}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert rows == tool.items(pairs, far) and len(rows) == 32
        true = {pair.first: pair.second for pair in pairs}
        for row in rows:
            assert row["choices"][row["answer"]] == true[row["context"]] and len(set(row["choices"])) == 4
            longest = len(row["context"]) + max(map(len, row["choices"]))
            assert longest <= (350 if language == "en" else 60)
        assert [sum(row["answer"] == place for row in rows) for place in range(4)] == [8] * 4


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),  # an end before the test is none
        ("import os; os._exit(0)", False),
        ("import os; os.close(1); os.close(2)", True),
        ("syntax error", False),
        ("import time; time.sleep(60)", False),
        ("x = 'a' * (8 << 30)", False),
        ("open('f', 'wb').write(b'0' * (32 << 20))", False),
        ("import os; assert 'HF_TOKEN' not in os.environ and not os.listdir(os.environ['HOME']) == []", True),
    ],
)
def test_programs_run_within_limits(program, passed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    scoring = load(ASSETS / "scoring.py")
    assert scoring.passes(program, seconds=2.0) is passed


def test_pass_at_1_runs_prompt_answer_and_test():
    scoring = load(ASSETS / "scoring.py")
    docs = [{"prompt": "def double(x):\n"}]
    test = "def check(f):\n    assert f(2) == 4\ncheck(double)"
    for answer, passed in (("    return 2 * x\n", 1.0), ("    return x\n", 0.0)):
        assert scoring.pass_at_1([test], scoring.programs([[answer]], docs)) == passed


def test_hashes_of_the_items(data):
    found = file_hashes([data / "mmlu", data / "gsm8k" / "test.jsonl"])
    assert len(found) == 2 and set(found.values()) == {
        "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    }


def test_a_window_that_cut_answers_short_is_told_of_tasks_that_write_some():
    configs = {"a": {"output_type": "generate_until"}, "b": {"output_type": "multiple_choice"}}
    results = RESULTS | {"configs": configs, "config": {"gen_kwargs": {"max_gen_toks": 64}}}
    found = {name: score(Asked(name, name, Call(name, (name,))), results, None) for name in "ab"}
    assert (found["a"]["answer_tokens"], found["b"]["answer_tokens"]) == (64, None)
    first, second = table(found).splitlines()[2:4]
    assert "answers of at most 64 tokens" in first and "answers" not in second
