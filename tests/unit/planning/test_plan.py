"""`minima plan`: memory, traffic, time and cost of recipes, among them of runs that no machine here can make."""

import json
import subprocess
import sys

import pytest
import yaml

from minima import cli
from minima.errors import RecipeError
from minima.planning.plan_text import assumptions, render
from minima.planning.run_plan import PARTS, as_dict
from minima.planning.throughput import LINK_FRACTION
from minima.recipe.loading import load_recipe
from minima.stages.plan_command import cluster_for
from minima.stages.plan_walk import plan_run
from tests.unit.planning.test_plan_hardware import result

RUNS = {"7B to 3B": ("recipes/minima-3b.yaml", 16), "70B to 27B": ("tests/data/llama-70b-27b.yaml", 1024)}
SMALL = {"vocabulary_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}


@pytest.fixture
def planned(root, tmp_path):
    """Gives the plans and the cluster of a shipped run, or of stages."""

    def planned(run, gpus=None, overrides=(), **asked):
        if isinstance(run, str):
            name, own = RUNS[run]
            path, gpus = root / name, own if gpus is None else gpus
        else:
            path = tmp_path / "x.yaml"
            path.write_text(yaml.safe_dump({"name": "x", "output": str(tmp_path / "out"), "stages": run}))
        recipe = load_recipe(path, list(overrides))
        asked = {"benchmarks": tmp_path} | asked
        cluster = cluster_for(recipe, path, gpus=gpus, **asked)
        return {plan.name: plan for plan in plan_run(recipe, path, cluster)}, cluster

    return planned


def stages(**changes) -> list[dict]:
    corpus = {"name": "c", "kind": "build_data", "sources": [{"embedded": "sotu"}], "tokenizer": "tok",
              "sequence_length": 128, "tokens": 1_280_000}  # fmt: skip
    student = {
        "name": "s",
        "kind": "distil",
        "model": {"random": SMALL},
        "teacher": {"random": SMALL},
        "data": "c",
        "learning_rate": 1e-3,
        "batch_sequences": 64,
        "micro_batch_sequences": 4,
        "epochs": 2,
    } | changes
    return [corpus, student]  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_parts_add_up_to_the_peak_in_every_place(planned, run):
    plans, _ = planned(run, gpu="h100")
    placed = plans["student"].placed
    assert {one.name for one in placed} == {
        "replica", "zero3_node", "zero3", "tensor_parallel", "zero3_node+cpu", "zero3+cpu",
    }  # fmt: skip
    for one in placed:
        assert tuple(one.parts) == PARTS
        assert sum(one.parts.values()) == one.peak_bytes
        assert min(one.parts.values()) >= 0


@pytest.mark.parametrize(("batch", "tokens"), [(2, 256), (4096, 524288)])
def test_parts_add_up_where_the_teachers_forward_is_the_peak_too(planned, batch, tokens):
    wide = SMALL | {"hidden_size": 512, "intermediate_size": 4096}
    plans, _ = planned(
        stages(teacher={"random": wide}, batch_sequences=batch, micro_batch_sequences=batch // 2), gpus=2
    )
    for one in plans["s"].placed:
        assert sum(one.parts.values()) == one.peak_bytes


@pytest.mark.parametrize("run", RUNS)
def test_the_largest_micro_batch_fits_and_the_next_one_does_not(planned, root, run):
    plans, cluster = planned(run, gpu="h100")
    recipe = load_recipe(root / RUNS[run][0])
    share = recipe.stage("student").batch_sequences // cluster.gpus
    checked = 0
    for one in plans["student"].placed:
        for level, size in one.largest_micro_batch.items():
            larger = [other for other in range(size + 1, share + 1) if share % other == 0]
            for wanted, fits in ((size, True), (larger[0] if larger else 0, False)):
                if wanted:
                    assert _fits(planned, run, wanted, level, one.name) == fits
                    checked += 1
    assert checked > 5


def _fits(planned, run, size, level, name) -> bool:
    overrides = [f"stages.student.micro_batch_sequences={size}", f"stages.student.activation_checkpointing={level}"]
    plans, _ = planned(run, gpu="h100", overrides=overrides)
    return not next(one for one in plans["student"].placed if one.name == name).refused


def test_a_run_of_7b_to_3b_on_16_gpus(planned):
    plans, _ = planned("7B to 3B", gpu="h100", price=2.0)
    student = plans["student"]
    assert (student.parameters, student.frozen_parameters) == (3_020_442_624, 6_879_449_088)
    assert student.tokens == 126_000_000_000 // 4096 * 4096 and student.steps == 30_041
    assert student.flops == pytest.approx(student.flops_per_token * student.tokens)
    assert student.flops_per_token == pytest.approx(33.5e9, rel=0.01)
    assert student.executed_flops_per_token == pytest.approx(39.5e9, rel=0.01)
    taken = student.chosen
    assert taken is not None and taken.name == "replica" and student.checkpointing == "full"
    # The floor by hand: executed FLOPs over two fifths of the peak of all GPUs.
    floor = 39.5e9 * 1024 * 4096 / 16 / (0.4 * 989.4e12)
    assert taken.time.compute == pytest.approx(floor, rel=0.01)
    assert floor < taken.time.seconds < 1.1 * floor
    assert taken.tokens_per_second == pytest.approx(1024 * 4096 / taken.time.seconds)
    hours = taken.time.seconds * 30_041 / 3600
    assert student.cost.hours == pytest.approx(hours)
    assert student.cost.gpu_hours == pytest.approx(16 * hours)
    assert student.cost.price == pytest.approx(32 * hours)
    assert student.disk == {
        "checkpoints, at most": 3 * 12 * student.parameters,
        "one checkpoint": 12 * student.parameters,
    }
    assert plans["corpus"].disk == {"data": 2 * (plans["corpus"].tokens + 4_194_304)}
    assert plans["minima"].disk == {"model": 2 * student.parameters}
    assert plans["teacher"].placed[0].name == "no teacher" and plans["teacher"].cost is not None
    assert plans["quality"].cost is not None and plans["pruned"].cost is not None


def test_a_run_of_70b_to_27b_on_1024_gpus(planned):
    plans, cluster = planned("70B to 27B", gpu="h100")
    student = plans["student"]
    assert cluster.nodes == 128
    assert student.frozen_parameters == pytest.approx(69e9, rel=0.01)
    assert student.parameters == pytest.approx(27e9, rel=0.02)
    places = {one.name: one for one in student.placed}
    assert places["replica"].parts["teacher"] > 2 * 68e9 and places["replica"].refused, "as bfloat16, 138 GB"
    assert student.taken == "zero3_node" and not places["zero3_node"].refused
    assert places["zero3"].traffic.between_nodes > places["zero3_node"].traffic.between_nodes
    assert student.cost.price is None and student.cost.gpu_hours > 1e5


def test_traffic_and_its_time_are_those_of_student_and_teacher(planned):
    plans, _ = planned("70B to 27B", gpu="h100")
    one = next(one for one in plans["student"].placed if one.name == "zero3")
    link = max(one.traffic.within_node / 450e9, one.traffic.between_nodes / 50e9) / LINK_FRACTION
    assert one.time.transfer == pytest.approx(link)
    # Each of 1,024 ranks gathers the teacher once, and the student twice but for what it keeps, and scatters float32.
    student, teacher = plans["student"].parameters, plans["student"].frozen_parameters
    least, most = 2 * (teacher - 0.3e9) + (2 + 4) * student, 2 * teacher + (2 * 2 + 4) * student
    assert least < one.traffic.received < most
    assert one.traffic.between_nodes == pytest.approx(one.traffic.received / 8)


def test_a_measured_gpu_gives_its_own_speed_back(planned, tmp_path):
    """The same shapes on one GPU: what was measured, less the optimiser's pass, which is part of it already."""
    found = result()
    (tmp_path / "bench.json").write_text(json.dumps(found))
    shapes = found["shapes"]
    own = stages(
        model={"random": shapes["student"]}, teacher={"random": shapes["teacher"]}, batch_sequences=4096,
        micro_batch_sequences=16, activation_checkpointing="full",
    )  # fmt: skip
    plans, cluster = planned(own, gpus=1, gpu="h100")
    assert cluster.efficiency.measured
    assert plans["s"].chosen.tokens_per_second == pytest.approx(9e6, rel=0.01)
    text = render(list(plans.values()), cluster, assumptions(cluster))
    assert "computed from a measured speed" in text and "bench.json" in text and "not measured:" not in text
    assert planned(own, gpus=1, gpu="h200")[1].efficiency.measured is False, "another GPU"


@pytest.mark.parametrize("run", RUNS)
def test_the_text_is_100_columns_wide_and_says_what_it_assumes(planned, run):
    plans, cluster = planned(run, gpu="h100", price=2.5)
    text = render(list(plans.values()), cluster, assumptions(cluster))
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    for wanted in ("computed, not measured", "0.4 of the published peak", "arXiv 2407.21783", "NVIDIA H100", "a choice",
                   "zero3", "tokens/s", "GPU-hours", "cost", "between machines", "largest micro-batch"):  # fmt: skip
        assert wanted in flat
    for plan in plans.values():
        assert f"\n{plan.name} ({plan.kind})" in text


def test_eight_places_still_fit_into_100_columns(planned):
    teacher = {"random": SMALL | {"num_heads": 2}, "nvme_path": "/x"}
    plans, cluster = planned(stages(teacher=teacher), gpus=16, gpu="h100", gpus_per_node=2)
    text = render(list(plans.values()), cluster, assumptions(cluster))
    assert len(plans["s"].placed) == 8 and max(map(len, text.splitlines())) <= 100
    assert "from NVMe" in text


def test_without_a_gpu_no_time_is_made_up(planned):
    plans, cluster = planned("7B to 3B")
    assert all(plan.cost is None and not plan.taken for plan in plans.values())
    text = render(list(plans.values()), cluster, assumptions(cluster))
    assert "give --gpu" in text and "    hours" not in text.split("all stages")[0] and "= peak" in text


def test_json_holds_the_same_numbers(planned):
    plans, cluster = planned("7B to 3B", gpu="h100", price=2.0)
    found = json.loads(json.dumps(as_dict(list(plans.values()), cluster, assumptions(cluster))))
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
    assert found["total"]["without"] == ["expanded", "corpus", "minima"]


def test_an_unknown_model_is_named_with_what_to_add(planned):
    own = stages(teacher="some-org/Big-9B")
    own.insert(1, {"name": "p", "kind": "prune", "model": "some-org/Big-9B", "data": "c", "target": {"sparsity": 50}})
    own[2]["model"] = "p"
    own.append({"name": "q", "kind": "evaluate", "models": ["p", "s"], "data": "c", "sequences": 4})
    plans, _ = planned(own, gpus=2, gpu="h100")
    assert "some-org/Big-9B is not known here" in plans["p"].notes[0]
    assert "model: {source: some-org/Big-9B, shape: {...}}` in stages.p" in plans["p"].notes[0]
    for name in ("s", "q"):
        assert len(plans[name].notes) == 1 and "some-org/Big-9B" in plans[name].notes[0]
    assert plans["s"].tokens == 2_560_000 and plans["s"].parameters is None
    own[1]["model"] = {"source": "some-org/Big-9B", "shape": SMALL | {"hidden_size": 16, "num_heads": 2}}
    plans, _ = planned(own, gpus=2, gpu="h100")
    assert plans["s"].chosen is not None, "one shape does for all that read the source"
    assert not any("not known" in note for plan in plans.values() for note in plan.notes)


def test_a_time_that_can_only_be_a_lower_bound_is_called_one(planned):
    assert any("lower bound" in note for note in planned(stages(), gpus=1, gpu="h100")[0]["s"].notes)
    assert not any("lower bound" in note for note in planned("7B to 3B", gpu="h100")[0]["student"].notes)


def test_where_nothing_fits_the_plan_says_so_and_names_no_cost(planned):
    overrides = ["stages.student.micro_batch_sequences=1024"]
    plans, cluster = planned("7B to 3B", gpus=1, gpu="4090", overrides=overrides)
    student = plans["student"]
    assert student.taken == "" and student.cost is None
    assert any("fits nowhere" in note for note in student.notes)
    assert all(one.refused for one in student.placed)
    text = render(list(plans.values()), cluster, assumptions(cluster))
    assert "fits                    no" in text and max(map(len, text.splitlines())) <= 100
    named = [*overrides, "stages.student.teacher.placement=replica"]
    student = planned("7B to 3B", gpus=1, gpu="4090", overrides=named)[0]["student"]
    assert student.taken == "replica" and student.cost is None and "may not fit" in student.notes[0]


def test_what_no_vendor_publishes_has_to_be_given(planned):
    plans, _ = planned("7B to 3B", gpus=16, gpu="l40s")
    assert plans["student"].cost is None
    assert any("--network-bandwidth" in note for note in plans["student"].notes)
    plans, _ = planned("7B to 3B", gpus=16, gpu="l40s", network_bandwidth=12.5e9)
    assert plans["student"].cost is not None


def test_a_place_that_the_recipe_names_is_the_one_that_is_taken(planned):
    teacher = {"random": SMALL, "placement": "zero3", "offload": "cpu", "window_micro_batches": 2}
    plans, _ = planned(stages(teacher=teacher), gpus=8, gpu="h100", gpus_per_node=4)
    assert plans["s"].taken == "zero3+cpu" and plans["s"].chosen.window == 2
    assert {one.name for one in plans["s"].placed} >= {"replica", "zero3_node", "zero3+cpu"}


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": -8}, "--gpus -8"),
        ({"gpus": 12}, "12 GPUs do not fill machines of 8"),
        ({"gpus": 3}, "batch_sequences 1024 does not divide by 3"),
        ({"gpus": 2048}, "batch_sequences 1024 does not divide by 2048"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0"),
        ({"gpu": "h1000"}, "the GPU 'h1000' is not known"),
        ({"price": 2.0}, "--price without --gpu"),
        ({"gpu": "h100", "price": -1.0}, "--price -1"),
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


def test_the_documentation_shows_what_the_command_prints(planned, root):
    shown = (root / "docs" / "plan.md").read_text(encoding="utf-8").split("```text\n")[1:]
    assert len(shown) == 3
    text = ""
    for run in RUNS:
        plans, cluster = planned(run, gpu="h100", price=2.0)
        text += render(list(plans.values()), cluster, assumptions(cluster))
    for block in shown:
        assert block.split("```")[0].strip() in text
