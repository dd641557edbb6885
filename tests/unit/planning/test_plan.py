"""`minima plan`: memory, traffic, time and cost of recipes, among them of runs that no machine here can make."""

import json

import pytest

from minima.errors import DeepSpeedConfigError
from minima.planning.plan_text import assumptions, render
from minima.planning.run_plan import PARTS, total_cost, untimed
from minima.planning.throughput import LINK_FRACTION
from minima.recipe.loading import load_recipe
from tests.unit.planning.runs import RUNS, SMALL, stages
from tests.unit.planning.test_plan_hardware import result


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
    plans, gpus = planned(run, gpu="h100")
    recipe = load_recipe(root / RUNS[run][0])
    share = recipe.stage("student").batch_sequences // gpus.count
    checked = 0
    for one in plans["student"].placed:
        for level, size in one.largest_micro_batch.items():
            larger = [other for other in range(size + 1, share + 1) if share % other == 0]
            for wanted, fits in ((size, True), (larger[0] if larger else 0, False)):
                if wanted:
                    assert _fits(planned, run, wanted, level, one.name) == fits
                    checked += 1
    assert checked > 5


@pytest.mark.parametrize("longer", ["model", "teacher"])
def test_rows_that_a_distillation_leaves_out_are_not_counted(planned, longer):
    same = {who: {"source": who, "shape": SMALL} for who in ("model", "teacher")}
    padded = {"source": longer, "shape": SMALL | {"vocabulary_size": SMALL["vocabulary_size"] + 640}}
    wanted, found = (planned(stages(**models), gpus=2)[0]["s"] for models in (same, same | {longer: padded}))
    assert any("last 640 vocabulary rows" in note for note in found.notes)
    assert found.parameters == wanted.parameters and found.frozen_parameters == wanted.frozen_parameters
    assert found.flops == wanted.flops and found.disk == wanted.disk
    assert [one.peak_bytes for one in found.placed] == [one.peak_bytes for one in wanted.placed]


def test_a_deepspeed_json_that_a_run_would_refuse_is_refused(planned, tmp_path):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 2}}')
    model = {"source": "model", "shape": SMALL}
    with pytest.raises(DeepSpeedConfigError, match="stage to 3"):
        planned(stages(model=model, teacher=model | {"source": "teacher"}, deepspeed="own.json"), gpus=2)


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
    plans, gpus = planned("70B to 27B", gpu="h100")
    student = plans["student"]
    assert gpus.nodes == 128
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
    plans, gpus = planned(own, gpus=1, gpu="h100")
    assert gpus.efficiency.measured
    assert plans["s"].chosen.tokens_per_second == pytest.approx(9e6, rel=0.01)
    text = render(list(plans.values()), gpus, assumptions(gpus))
    assert "computed from a measured speed" in text and "bench.json" in text and "not measured:" not in text
    assert planned(own, gpus=1, gpu="h200")[1].efficiency.measured is False, "another GPU"


def test_a_time_that_can_only_be_a_lower_bound_is_called_one(planned):
    assert any("lower bound" in note for note in planned(stages(), gpus=1, gpu="h100")[0]["s"].notes)
    assert not any("lower bound" in note for note in planned("7B to 3B", gpu="h100")[0]["student"].notes)


def test_where_nothing_fits_the_plan_says_so_and_names_no_cost(planned):
    overrides = ["stages.student.micro_batch_sequences=1024"]
    plans, gpus = planned("7B to 3B", gpus=1, gpu="4090", overrides=overrides)
    student = plans["student"]
    assert student.taken == "" and student.cost is None
    assert any("fits nowhere" in note for note in student.notes)
    assert all(one.refused for one in student.placed)
    text = render(list(plans.values()), gpus, assumptions(gpus))
    assert "fits                    no" in text and max(map(len, text.splitlines())) <= 100
    assert total_cost(list(plans.values()), gpus) is None, "a sum of what is left is no cost of the run"
    assert "no total: teacher, student, quality would not fit on these GPUs" in text
    total, own = (
        next(line for line in text.splitlines() if line.startswith(f"  {name} ")) for name in ("total", "teacher")
    )
    assert total.split()[2:5] == ["-", "-", "-"], "hours, GPU-hours, cost"
    assert own.split()[4:8] == ["-", "-", "-", "-"], "tokens/s, too, as in the stage's own table"
    named = [*overrides, "stages.student.teacher.placement=replica"]
    student = planned("7B to 3B", gpus=1, gpu="4090", overrides=named)[0]["student"]
    assert student.taken == "replica" and student.cost is None and "replica needs" in student.notes[0]


def test_a_stage_that_only_runs_models_and_does_not_fit_has_no_time(planned):
    plans, _ = planned("7B to 3B", gpu="h100", gpu_memory=4e9)
    assert plans["quality"].cost is None and plans["quality"].too_large
    assert set(untimed(list(plans.values())).too_large) == {"teacher", "pruned", "student", "quality"}


def test_stages_without_a_time_are_told_apart(planned):
    own = stages(batch_sequences=64)
    own += [{"name": "e", "kind": "export", "model": "s"}]
    own += [{"name": "b", "kind": "benchmark", "model": "e", "tasks": ["gsm8k"]}]
    plans, gpus = planned(own, gpus=1, gpu="h100", price=2.0)
    found = untimed(list(plans.values()))
    assert (found.idle, found.unknown, found.too_large) == (("c", "e"), ("b",), ())
    assert total_cost(list(plans.values()), gpus) is None
    text = " ".join(render(list(plans.values()), gpus, assumptions(gpus)).split())
    assert "no GPU time is spent by c, e" in text
    assert "no total: no time is known for b; the others take" in text


def test_a_place_that_the_recipe_names_is_the_one_that_is_taken(planned):
    teacher = {"random": SMALL, "placement": "zero3", "offload": "cpu", "window_micro_batches": 2}
    plans, _ = planned(stages(teacher=teacher), gpus=8, gpu="h100", gpus_per_node=4)
    assert plans["s"].taken == "zero3+cpu" and plans["s"].chosen.window == 2
    assert {one.name for one in plans["s"].placed} >= {"replica", "zero3_node", "zero3+cpu"}
    alone = planned(stages(teacher={"random": SMALL, "placement": "zero3"}), gpus=4, gpu="h100")[0]["s"]
    assert alone.taken == "zero3" and alone.chosen is not None, "which `auto` would call zero3_node on one machine"


def align(**changes) -> list[dict]:
    pairs = {"name": "c", "kind": "build_data", "format": "preferences", "sources": [{"embedded": "preferences"}],
             "tokenizer": "tok", "sequence_length": 128, "tokens": 128_000}  # fmt: skip
    stage = {"name": "a", "kind": "align", "model": {"random": SMALL}, "data": "c", "learning_rate": 1e-5,
             "batch_sequences": 8, "micro_batch_sequences": 2, "steps": 10} | changes  # fmt: skip
    return [pairs, stage]


def test_a_reference_stays_where_it_is_and_a_precomputed_one_takes_no_memory(planned):
    beside, once = (planned(align(precompute_reference=value), gpus=2, gpu="h100")[0]["a"] for value in (False, True))
    assert [one.name for one in beside.placed] == ["zero3"] and beside.placed[0].parts["teacher"] > 0
    assert [one.name for one in once.placed] == ["no teacher"] and once.placed[0].parts["teacher"] == 0
    assert any("reference" in note for note in once.notes)
    assert once.flops_per_token < beside.flops_per_token


def test_importance_takes_as_long_on_more_gpus_than_it_has_micro_batches(planned):
    few, enough, many = (planned("70B to 27B", gpus=gpus, gpu="h100")[0]["pruned"] for gpus in (512, 1024, 2048))
    assert few.cost.hours == pytest.approx(2 * enough.cost.hours)
    assert many.cost.hours == enough.cost.hours, "8,192 sequences in micro-batches of 8"
    forward = enough.flops_per_token / 2
    assert enough.cost.hours == pytest.approx(3 * forward * 8 * 4096 / (0.4 * 989.4e12) / 3600)


def test_an_evaluation_holds_a_model_and_the_teacher(planned):
    with_teacher, alone = (
        planned("7B to 3B", gpus=16, gpu="h100", overrides=overrides)[0]["quality"]
        for overrides in ((), ("stages.quality.teacher=null", "stages.quality.models=[student]"))
    )
    assert with_teacher.memory["weights"] > 2 * 6.8e9 * 2 / 16, "of the largest model and of the teacher, a sixteenth"
    assert with_teacher.memory["heads"] > 1.7 * alone.memory["heads"]
    assert with_teacher.flops > 8 * alone.flops
