"""What `minima plan` prints, as text and as JSON, and what it refuses."""

import json
import subprocess
import sys

import pytest

from minima import cli
from minima.errors import RecipeError
from minima.planning.plan_text import assumptions, render
from minima.planning.run_plan import as_dict
from tests.unit.planning.runs import RUNS, SMALL, stages


@pytest.mark.parametrize("run", RUNS)
def test_the_text_is_100_columns_wide_and_says_what_it_assumes(planned, run):
    plans, gpus = planned(run, gpu="h100", price=2.5)
    text = render(list(plans.values()), gpus, assumptions(gpus))
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    for wanted in ("computed, not measured", "0.4 of the published peak", "arXiv 2407.21783", "NVIDIA H100", "a choice",
                   "zero3", "tokens/s", "GPU-hours", "cost", "between machines", "largest micro-batch"):  # fmt: skip
        assert wanted in flat
    for plan in plans.values():
        assert f"\n{plan.name} ({plan.kind})" in text


def test_eight_places_still_fit_into_100_columns(planned):
    teacher = {"random": SMALL | {"num_heads": 2}, "nvme_path": "/x"}
    plans, gpus = planned(stages(teacher=teacher), gpus=16, gpu="h100", gpus_per_node=2)
    text = render(list(plans.values()), gpus, assumptions(gpus))
    assert len(plans["s"].placed) == 8 and max(map(len, text.splitlines())) <= 100
    assert "from NVMe" in text


def test_without_a_gpu_no_time_is_made_up(planned):
    plans, gpus = planned("7B to 3B")
    assert all(plan.cost is None and not plan.taken for plan in plans.values())
    text = render(list(plans.values()), gpus, assumptions(gpus))
    assert "give --gpu" in text and "    hours" not in text.split("all stages")[0] and "= peak" in text


def test_json_holds_the_same_numbers(planned):
    plans, gpus = planned("7B to 3B", gpu="h100", price=2.0)
    found = json.loads(json.dumps(as_dict(list(plans.values()), gpus, assumptions(gpus))))
    student = next(stage for stage in found["stages"] if stage["name"] == "student")
    taken = next(one for one in student["placed"] if one["name"] == student["taken"])
    assert taken["tokens_per_second"] == plans["student"].chosen.tokens_per_second
    assert taken["time"]["seconds"] == pytest.approx(
        sum(taken["time"][name] for name in ("compute", "update", "transfer", "host"))
    )
    assert taken["traffic"]["within_node"] + taken["traffic"]["between_nodes"] == taken["traffic"]["received"]
    hours = sum(stage["cost"]["gpu_hours"] for stage in found["stages"] if stage["cost"])
    assert found["total"]["gpu_hours"] == pytest.approx(hours)
    assert found["total"]["price"] == pytest.approx(2 * hours)
    assert found["without_time"] == {"idle": ["expanded", "corpus", "minima"], "unknown": [], "too_large": []}
    plans, gpus = planned("7B to 3B", gpus=8, gpu="4090", price=1.0)
    found = as_dict(list(plans.values()), gpus, assumptions(gpus))
    assert found["total"] is None and found["without_time"]["too_large"] == ("teacher", "student")


def test_an_unknown_model_is_named_with_what_to_add(planned):
    own = stages(teacher="some-org/Big-9B")
    own.insert(1, {"name": "p", "kind": "prune", "model": "some-org/Big-9B", "data": "c", "target": {"sparsity": 50}})
    own[2]["model"] = "p"
    own.append({"name": "q", "kind": "evaluate", "models": ["p", "s"], "data": "c", "sequences": 4})
    plans, _ = planned(own, gpus=2, gpu="h100")
    assert "the shape of some-org/Big-9B is unknown on this machine" in plans["p"].notes[0]
    assert "model: {source: some-org/Big-9B, shape: {...}}` in stages.p" in plans["p"].notes[0]
    for name in ("s", "q"):
        assert len(plans[name].notes) == 1 and "some-org/Big-9B" in plans[name].notes[0]
    assert plans["s"].tokens == 2_560_000 and plans["s"].parameters is None
    own[1]["model"] = {"source": "some-org/Big-9B", "shape": SMALL | {"hidden_size": 16, "num_heads": 2}}
    plans, _ = planned(own, gpus=2, gpu="h100")
    assert plans["s"].chosen is not None, "one shape does for all that read the source"
    assert not any("not known" in note for plan in plans.values() for note in plan.notes)


def test_what_no_vendor_publishes_has_to_be_given(planned):
    plans, _ = planned("7B to 3B", gpus=16, gpu="l40s")
    assert plans["student"].cost is None
    assert any("--network-bandwidth" in note for note in plans["student"].notes)
    plans, _ = planned("7B to 3B", gpus=16, gpu="l40s", network_bandwidth=12.5e9)
    assert plans["student"].cost is not None


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": -8}, "--gpus -8"),
        ({"gpus": 12}, "12 GPUs do not fill machines of 8"),
        ({"gpus": 3}, "batch_sequences 1024 is not divisible by 3"),
        ({"gpus": 2048}, "batch_sequences 1024 is not divisible by 2048"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0"),
        ({"gpu": "h1000"}, "the GPU 'h1000' is not known"),
        ({"price": 2.0}, "--price without --gpu"),
        ({"gpu": "h100", "price": -1.0}, "--price -1"),
        ({"gpu": "h100", "price": float("nan")}, "--price nan"),
        ({"gpu": "h100", "price": float("inf")}, "--price inf"),
        ({"host_memory": float("nan")}, "--host-memory nan"),
        ({"host_memory": float("inf")}, "--host-memory inf"),
        ({"host_memory": -1.0}, "--host-memory -1"),
        ({"gpu": "h100", "efficiency": 40.0}, "--efficiency 40"),
        ({"gpu": "h100", "gpu_memory": 0.0}, "memory_bytes"),
    ],
)
def test_bad_input_is_named(planned, asked, wrong):
    with pytest.raises(RecipeError) as error:
        planned("7B to 3B", **asked)
    assert wrong in error.value.what


def test_the_command_prints_a_plan_without_torch(root):
    code = "import sys\nfrom minima.cli import main\ncode = main(sys.argv[1:])\n"
    code += "heavy = {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\nassert code == 0 and not heavy, heavy"
    options = ["plan", "minima-3b", "--gpus", "16", "--gpu", "h100", "--price", "2", "--json"]
    options += ["stages.student.micro_batch_sequences=4"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpus"] == 16
    assert cli.main(["plan", "minima-3b", "--gpus", "0"]) == 2


def test_chosen_stages_alone_are_shown_and_added_up(capsys):
    def planned(*flags):
        assert cli.main(["plan", "minima-3b", "--gpus", "16", "--gpu", "h100", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    whole, chosen = planned(), planned("--stages", "student,pruned")
    wanted = [stage for stage in whole["stages"] if stage["name"] in ("pruned", "student")]
    assert chosen["stages"] == wanted and len(wanted) == 2
    assert chosen["total"]["gpu_hours"] < whole["total"]["gpu_hours"]
    assert cli.main(["plan", "minima-3b", "--stages", "studnt"]) == 2
    assert "student" in capsys.readouterr().err


def test_the_memory_that_is_published_is_called_less_than_a_card_reports(planned):
    said = [" ".join(assumptions(planned("7B to 3B", gpu="h100", **asked)[1])) for asked in ({}, {"gpu_memory": 85e9})]
    assert "pass what it reports with --gpu-memory" in said[0] and "--gpu-memory" not in said[1]


def test_the_documentation_shows_what_the_command_prints(planned, root):
    shown = (root / "docs" / "plan.md").read_text(encoding="utf-8").split("```text\n")[1:]
    assert len(shown) == 3
    text = ""
    for run in RUNS:
        plans, gpus = planned(run, gpu="h100", price=2.0)
        text += render(list(plans.values()), gpus, assumptions(gpus))
    for block in shown:
        assert block.split("```")[0].strip() in text


def test_a_stage_is_named_once(planned):
    own = stages(teacher="t@7")
    own.insert(1, {"name": "t", "kind": "adapt", "model": {"random": SMALL}, "data": "c", "steps": 20,
                   "batch_sequences": 8, "micro_batch_sequences": 2, "learning_rate": 1e-4})  # fmt: skip
    with pytest.raises(RecipeError) as error:
        planned(own, gpus=2)
    assert error.value.what.count("stages.") == 1 and error.value.what.startswith("stages.s.teacher: 't@7'")
