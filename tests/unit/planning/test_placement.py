"""What `auto` takes on which machine, why, and how it is shown."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from minima.errors import RecipeError
from minima.models.shape import ModelShape
from minima.planning.candidates import MARGIN, Devices, TrainedStage, candidates
from minima.planning.memory import Work, frozen_memory, split_elements, trained_memory
from minima.planning.placement import choose, render, unchosen
from minima.planning.sharding import STUDENT, TEACHER, Sharding
from minima.recipe.distillation import Distil

GB = 10**9
TEACHER_7B = ModelShape(
    vocabulary_size=49216, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32
)  # fmt: skip
STUDENT_3B = ModelShape(
    vocabulary_size=49216, hidden_size=3072, intermediate_size=8192, num_layers=24, num_heads=24, head_size=128
)  # fmt: skip
NODE = Devices(ranks=8, ranks_per_node=8, device_bytes=85 * GB, host_bytes=1000 * GB)


def stage_of(teacher=None, **changes) -> Distil:
    given = {
        "name": "student", "kind": "distil", "model": "a", "teacher": {"source": "b"} | (teacher or {}), "data": "c",
        "batch_sequences": 1024, "micro_batch_sequences": 2, "steps": 1, "learning_rate": 1e-3,
        "activation_checkpointing": "full",
    }  # fmt: skip
    return Distil.model_validate(given | changes)


def chosen(stage: Distil, devices: Devices, **changes):
    shapes = {"teacher_shape": TEACHER_7B, "student": STUDENT_3B} | changes
    return choose(
        TrainedStage("student", stage, sequence_length=4096, sharding=STUDENT, teacher=stage.teacher, **shapes), devices
    )


def smallest_device(name: str, devices: Devices, stage: Distil) -> int:
    """Bytes of the smallest device on which that candidate fits."""
    rows, _ = candidates(
        TrainedStage("s", stage, STUDENT_3B, 4096, STUDENT, stage.teacher, TEACHER_7B),
        replace(devices, device_bytes=GB),
        "full",
    )
    return int(next(row.peak_bytes for row in rows if row.name == name) / (1 - MARGIN)) + 2


def test_the_published_run_fits_one_80_gb_device_as_a_replica():
    choice = chosen(stage_of(activation_checkpointing="auto"), replace(NODE, ranks=1, ranks_per_node=1))
    assert (choice.placement, choice.offload, choice.activation_checkpointing) == ("replica", "none", "full")
    assert choice.window_micro_batches == 1, "no weight travels"
    resident = choice.chosen.student.resident_bytes + choice.chosen.teacher.resident_bytes
    assert resident - 4 * STUDENT.reduce_bucket_elements == 18 * STUDENT_3B.parameters + 2 * TEACHER_7B.parameters
    assert 68.1e9 < resident < 68.4e9
    assert choice.chosen.peak_bytes < 76e9
    assert "with activation_checkpointing none, replica as the smallest needs" in choice.reason


@pytest.mark.parametrize(
    ("name", "ranks", "placement", "offload"),
    [
        ("replica", 8, "replica", "none"),
        ("zero3_node", 32, "zero3_node", "none"),
        ("zero3", 32, "zero3", "none"),
        ("zero3_node+cpu", 32, "zero3_node", "cpu"),
    ],
)
def test_auto_takes_the_first_that_fits(name, ranks, placement, offload):
    stage = stage_of(batch_sequences=2048)
    devices = replace(NODE, ranks=ranks, device_bytes=GB)
    devices = replace(devices, device_bytes=smallest_device(name, devices, stage) + GB // 5)
    choice = chosen(stage, devices)
    assert (choice.placement, choice.offload) == (placement, offload)
    assert (choice.window_micro_batches == 1) == (placement == "replica"), "shared traffic only where weights travel"
    for row in choice.rows[: choice.rows.index(choice.chosen)]:
        assert f"{row.name} needs" in choice.reason


def test_host_memory_comes_after_recomputation_and_nvme_needs_a_path():
    stage = stage_of(activation_checkpointing="auto", teacher={"nvme_path": "/local"})
    devices = replace(NODE, device_bytes=smallest_device("zero3_node", NODE, stage))
    choice = chosen(stage, devices)
    assert (choice.placement, choice.offload, choice.activation_checkpointing) == ("zero3_node", "none", "full")
    small = replace(devices, device_bytes=smallest_device("zero3_node+cpu", NODE, stage))
    assert chosen(stage, small).offload == "cpu"
    for level in ("none", "selective"):
        assert f"with activation_checkpointing {level}, " in chosen(stage, small).reason
    host_bytes = chosen(stage, small).chosen.host_bytes
    poor = replace(small, host_bytes=int(0.95 * host_bytes / 0.8))  # a fifth is left for others
    choice = chosen(stage, poor)
    assert choice.offload == "nvme"
    assert "on a machine with" in choice.reason
    with pytest.raises(RecipeError):
        chosen(stage_of(activation_checkpointing="auto"), poor)


def test_what_passes_counts_once_and_one_machine_shards_one_way():
    stage = stage_of()
    rows, excluded = candidates(
        TrainedStage("s", stage, STUDENT_3B, 4096, STUDENT, stage.teacher, TEACHER_7B), NODE, "full"
    )
    assert [row.name for row in rows] == ["replica", "zero3_node", "tensor_parallel", "zero3_node+cpu"]
    assert "zero3 is impossible: on one machine it is the same as zero3_node" in excluded
    for row in rows:
        hidden = row.teacher.passing["hidden"]
        kept = row.student.resident_bytes + row.teacher.resident_bytes + hidden
        assert row.peak_bytes - kept == max(row.student.passing_bytes, row.teacher.passing_bytes - hidden)


def test_a_split_needs_heads_that_divide():
    grouped = TEACHER_7B.model_copy(update={"num_key_value_heads": 4})
    stage = stage_of()
    for shape, possible in ((TEACHER_7B, True), (grouped, False)):
        rows, excluded = candidates(
            TrainedStage("s", stage, STUDENT_3B, 4096, STUDENT, stage.teacher, shape), NODE, "full"
        )
        assert ("tensor_parallel" in {row.name for row in rows}) == possible
        assert ("4 key-value heads are not divisible by 8 ranks" in "; ".join(excluded)) == (not possible)


def test_a_named_split_of_heads_that_do_not_divide_is_told_before_it_is_tried():
    grouped = TEACHER_7B.model_copy(update={"num_key_value_heads": 4})
    stage = stage_of(teacher={"placement": "tensor_parallel"})
    choice = chosen(stage, NODE, teacher_shape=grouped)
    assert choice.chosen.refused == "is impossible: 4 key-value heads are not divisible by 8 ranks"
    assert choice.warning == f"tensor_parallel {choice.chosen.refused}"
    planned = TrainedStage("s", stage, STUDENT_3B, 4096, STUDENT, stage.teacher, grouped)
    assert choice.warning in unchosen(planned, 8)
    assert not chosen(stage_of(teacher={"placement": "tensor_parallel", "tensor_parallel_ranks": 4}), NODE,
                      teacher_shape=grouped).warning  # fmt: skip
    gpt2 = TEACHER_7B.model_copy(update={"family": "gpt2"})
    assert "cannot split a gpt2" in chosen(stage, NODE, teacher_shape=gpt2).warning


def test_the_window_shrinks_where_hidden_states_do_not_fit():
    stage = stage_of(batch_sequences=2048, teacher={"placement": "zero3_node"})
    devices = replace(NODE, ranks=32)
    wide = chosen(stage, devices)
    assert wide.window_micro_batches == 8
    tight = chosen(stage, replace(devices, device_bytes=int(wide.chosen.peak_bytes / (1 - MARGIN)) - GB // 100))
    assert 1 <= tight.window_micro_batches < 8
    assert not tight.warning
    named = stage_of(batch_sequences=2048, teacher={"placement": "zero3_node", "window_micro_batches": 8})
    assert chosen(named, tight.devices).window_micro_batches == 8, "what is named stays"


def test_what_is_named_is_taken_with_a_warning():
    choice = chosen(stage_of(teacher={"placement": "replica"}), replace(NODE, device_bytes=10 * GB))
    assert choice.placement == "replica"
    assert len(choice.rows) == 1
    assert "replica needs" in choice.warning
    assert "warning: replica needs" in render(choice)


def test_a_teacher_may_have_a_precision_of_its_own():
    choice = chosen(stage_of(teacher={"placement": "replica", "precision": "float32"}), NODE)
    assert choice.chosen.teacher.device["weights"] == 4 * TEACHER_7B.parameters
    assert choice.chosen.student.device["weights"] == pytest.approx(2 * STUDENT_3B.parameters / 8, rel=1e-3)


def test_a_loss_with_a_teacher_holds_both_models_logits():
    wide = {"vocabulary_size": 400_000, "hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 1}
    stage, shape = stage_of(teacher={"placement": "replica"}), ModelShape(**wide)
    alone = candidates(TrainedStage("s", stage, shape, 4096, STUDENT), NODE, "full")[0][0].student
    taught = chosen(stage, NODE, student=shape, teacher_shape=shape).chosen.student
    more = taught.passing["loss or layer"] - alone.passing["loss or layer"]
    assert more == 4 * stage.chunk_tokens * 400_000


def test_machines_of_unequal_size_share_no_copy_on_each():
    stage = stage_of(batch_sequences=1536)
    devices = replace(NODE, ranks=12)
    planned = TrainedStage("s", stage, STUDENT_3B, 4096, STUDENT, stage.teacher, TEACHER_7B)
    rows, excluded = candidates(planned, devices, "full")
    assert [row.name for row in rows] == ["replica", "zero3", "zero3+cpu"]
    for name in ("zero3_node", "tensor_parallel", "zero3_node+cpu"):
        assert f"{name} is impossible: the machines have different numbers of ranks" in excluded


def test_a_window_wider_than_a_step_is_told():
    wide = stage_of(teacher={"placement": "zero3_node", "window_micro_batches": 1000})
    choice = chosen(wide, NODE)
    assert (
        choice.warning == f"window_micro_batches is 1000, but a step has only {choice.window_micro_batches} micro-"
        f"batches on each rank, so the window is {choice.window_micro_batches}"
    )
    fits = stage_of(teacher={"placement": "zero3_node", "window_micro_batches": choice.window_micro_batches})
    assert not chosen(fits, NODE).warning


def test_nothing_fits():
    with pytest.raises(RecipeError) as error:
        chosen(stage_of(activation_checkpointing="auto"), replace(NODE, device_bytes=5 * GB))
    assert error.value.what.startswith("stages.student:")
    assert "zero3_node+cpu" in error.value.why, "the table"
    assert "student_zero3_offload.json" in error.value.do


def test_without_a_teacher_only_recomputation_is_chosen():
    stage = stage_of(activation_checkpointing="auto")
    for device, level in ((85, "none"), (16, "full"), (5, "full")):
        choice = choose(TrainedStage("s", stage, STUDENT_3B, 4096, STUDENT), replace(NODE, device_bytes=device * GB))
        assert (choice.placement, choice.activation_checkpointing) == (None, level)
        assert bool(choice.warning) == (device == 5)


def test_on_a_cpu_the_hosts_memory_is_the_device():
    devices = Devices(2, 2, device_bytes=20 * GB, host_bytes=40 * GB, host_is_device=True)
    stage = stage_of()
    rows, excluded = candidates(
        TrainedStage("s", stage, STUDENT_3B, 4096, STUDENT, stage.teacher, TEACHER_7B), devices, "full"
    )
    assert not [row for row in rows if row.offload == "cpu"]
    assert "zero3_node+cpu is impossible: host and device share one memory" in excluded
    offloaded = TrainedStage(
        "s", stage, STUDENT_3B, 4096, replace(STUDENT, offload_optimizer=True), stage.teacher, TEACHER_7B
    )
    for here, there in zip(rows, candidates(offloaded, devices, "full")[0], strict=True):
        assert there.host_bytes == 0 and there.peak_bytes > here.peak_bytes, "what is offloaded lies there all the same"


@pytest.mark.parametrize("ranks", [1, 8, 32])
def test_the_table_reads_in_100_columns(ranks):
    text = render(chosen(stage_of(), replace(NODE, ranks=ranks, ranks_per_node=min(8, ranks))))
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines if not line.startswith("because"))
    header, replica = next(pair for pair in pairwise(lines) if pair[0].startswith("placement"))
    assert header.split() == ["placement", "weights", "gathered", "activations", "head", "hidden", "student", "peak",
                              "host", "fits"]  # fmt: skip
    assert replica.split()[:3] == ["replica", "13.8", "GB"]


def test_offload_moves_an_optimisers_states_to_the_host():
    work = Work(2, 4096)
    here = trained_memory(STUDENT_3B, "bfloat16", "full", work, 8, STUDENT)
    there = trained_memory(STUDENT_3B, "bfloat16", "full", work, 8, replace(STUDENT, offload_optimizer=True))
    states = here.device["master"] + here.device["moments"] + here.device["gradients"]
    assert here.resident_bytes - there.resident_bytes == states
    assert there.host_bytes == states + here.device["gradients"]


def test_page_locked_shards_come_in_powers_of_two():
    loose, pinned = (
        frozen_memory(TEACHER_7B, "bfloat16", "zero3_node", "cpu", Work(2, 4096), 8, replace(TEACHER, pinned=value))
        for value in (False, True)
    )
    assert loose.host_bytes == pytest.approx(2 * TEACHER_7B.parameters / 8, rel=0.001)
    assert 1 < pinned.host_bytes / loose.host_bytes < 2


def test_split_matrices_are_divided_and_embeddings_are_not():
    table = TEACHER_7B.vocabulary_size * TEACHER_7B.hidden_size
    assert split_elements(TEACHER_7B, 1) == TEACHER_7B.parameters
    assert split_elements(TEACHER_7B, 4) == pytest.approx(table + (TEACHER_7B.parameters - table) / 4, rel=0.001)


def test_sizes_come_from_the_shipped_jsons(root):
    for name, sizes in (("student_zero3", STUDENT), ("teacher_zero3", TEACHER)):
        found = Sharding.from_json(json.loads((root / "ds_configs" / f"{name}.json").read_text()))
        unset = {"reduce_bucket_elements", "sub_group_elements"} if name == "teacher_zero3" else set()
        for field in vars(sizes).keys() - unset:
            assert getattr(found, field) == getattr(sizes, field), (name, field)
    offload = Sharding.from_json(json.loads((root / "ds_configs" / "student_zero3_offload.json").read_text()))
    assert offload == replace(STUDENT, offload_optimizer=True, pinned=True)
    cpu = Sharding.from_json(json.loads((root / "ds_configs" / "teacher_cpu.json").read_text()))
    assert (cpu.offload_weights, cpu.pinned) == ("cpu", True)
