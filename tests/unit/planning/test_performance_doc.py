"""The computed tables of docs/performance.md are what the functions that it names give."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from minima.planning.arithmetic import executed_flops_per_token, model_flops_per_token
from minima.planning.candidates import Devices, TrainedStage, candidates
from minima.planning.hardware import GPUS
from minima.planning.memory import Work, frozen_memory, trained_memory
from minima.planning.sharding import STUDENT, TEACHER
from minima.planning.throughput import Efficiency, step_time
from minima.planning.traffic import frozen_traffic, trained_traffic
from minima.planning.units import size_text
from tests.unit.planning.test_placement import STUDENT_3B, TEACHER_7B, stage_of

MATMUL = 790e12  # FLOP/s: what the page assumes of large bfloat16 matrix products on an H100


def floor_rows() -> Iterator[str]:
    for length in (2048, 4096, 8192, 32768):
        model = model_flops_per_token(STUDENT_3B, TEACHER_7B, length)
        executed = executed_flops_per_token(STUDENT_3B, TEACHER_7B, length)
        cells = f"{model / 1e9:.1f} | {executed / 1e9:.1f} | {MATMUL / model:,.0f} | {MATMUL / executed:,.0f}"
        yield f"| {length:,} | {cells} |"


def memory_rows() -> Iterator[str]:
    for micro_batch in (1, 2, 4):
        for level in ("none", "selective", "full"):
            work = Work(micro_batch, 4096)
            memory = trained_memory(STUDENT_3B, "bfloat16", level, work, 1, STUDENT)  # type: ignore[arg-type]
            teacher = frozen_memory(TEACHER_7B, "bfloat16", "replica", "none", work, 1, TEACHER)
            total = memory.device_bytes + teacher.resident_bytes + teacher.passing["hidden"]
            cells = [memory.passing["activations"], memory.passing["head"], memory.passing["loss or layer"], total]
            yield f"| {micro_batch} x 4,096 | {level} | " + " | ".join(map(size_text, cells)) + " |"


def vocabulary_rows() -> Iterator[str]:
    for vocabulary in (32000, 49216, 128256, 256000):
        student, teacher = (
            shape.model_copy(update={"vocabulary_size": vocabulary}) for shape in (STUDENT_3B, TEACHER_7B)
        )
        work = Work(2, 4096)
        memory = trained_memory(student, "bfloat16", "full", work, 8, STUDENT)
        chunk = work.chunk_tokens * vocabulary * 10
        dense = 2 * 2 * work.tokens * vocabulary
        flops = model_flops_per_token(student, teacher, 4096)
        yield (
            f"| {vocabulary:,} | {flops / 1e9:.1f} | {size_text(memory.passing['head'])} | {size_text(chunk)} | "
            f"{size_text(dense)} |"
        )


def traffic_rows() -> Iterator[str]:
    for ranks in (8, 32, 64):
        work = Work(2, 4096, accumulation=512 // ranks)
        found = [trained_traffic(STUDENT_3B, "bfloat16", work, ranks, 8, STUDENT)]
        for placement, group in (("zero3_node", 8), ("zero3", ranks)):
            for window in (1, 8):
                found.append(
                    frozen_traffic(TEACHER_7B, "bfloat16", placement, "none", work, group, 8, TEACHER, window=window)
                )
        split = frozen_traffic(TEACHER_7B, "bfloat16", "tensor_parallel", "none", work, 8, 8, TEACHER)
        cells = [f"{one.received / 1e9:,.0f} ({one.between_nodes / 1e9:,.0f})" for one in [*found, split]]
        yield f"| {ranks} | " + " | ".join(cells) + " |"


def seconds_rows() -> Iterator[str]:
    gpu, floor = GPUS["h100"], Efficiency(MATMUL / GPUS["h100"].peak_flops)
    flops = executed_flops_per_token(STUDENT_3B, TEACHER_7B, 4096) * 512 * 4096
    for ranks in (1, 8, 32, 64):
        work, offload = Work(2, 4096, accumulation=256 // ranks), "cpu" if ranks == 1 else "none"
        student = trained_traffic(STUDENT_3B, "bfloat16", work, ranks, 8, STUDENT)
        places = [("zero3_node", min(ranks, 8)), ("zero3", ranks)]
        teachers = [
            frozen_traffic(TEACHER_7B, "bfloat16", placement, offload, work, group, 8, TEACHER, window=window)
            for placement, group in places
            for window in (1, 8)
        ]
        shard = STUDENT_3B.parameters / ranks
        own, *taught = (step_time(flops / ranks, "bfloat16", [one], shard, gpu, floor) for one in [student, *teachers])
        cells = [own.compute, own.update, own.transfer, *(one.transfer + one.host for one in taught)]
        name = "1, `offload: cpu`" if ranks == 1 else str(ranks)
        yield f"| {name} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |"


def placement_rows() -> Iterator[str]:
    devices = Devices(32, 8)
    stage = stage_of(batch_sequences=2048)
    planned = TrainedStage("s", stage, STUDENT_3B, 4096, STUDENT, stage.teacher, TEACHER_7B)
    for row in candidates(planned, devices, "full")[0]:
        teacher = row.teacher
        cells = [
            teacher.device.get("weights", 0), teacher.passing.get("gathered", 0),
            teacher.device.get("head", 0), teacher.passing["hidden"], row.host_bytes,
        ]  # fmt: skip
        yield f"| `{row.name}` | " + " | ".join(size_text(cell) if cell else "-" for cell in cells) + " |"


ROWS = [floor_rows, memory_rows, vocabulary_rows, traffic_rows, seconds_rows, placement_rows]


@pytest.mark.parametrize("rows", ROWS)
def test_the_documents_tables_are_computed(root, rows):
    lines = (root / "docs" / "performance.md").read_text().splitlines()
    for row in rows():
        assert row in lines, f"write this row into the document: {row}"


def test_the_floor_of_the_published_shapes():
    """The work of a token: 33.5 GFLOP a token of model work, 39.5 with full recomputation."""
    assert model_flops_per_token(STUDENT_3B, TEACHER_7B, 4096) == pytest.approx(33.5e9, abs=0.05e9)
    assert executed_flops_per_token(STUDENT_3B, TEACHER_7B, 4096, "full") == pytest.approx(39.5e9, abs=0.05e9)
    for level in ("none", "selective"):
        model = model_flops_per_token(STUDENT_3B, TEACHER_7B, 4096)
        assert executed_flops_per_token(STUDENT_3B, TEACHER_7B, 4096, level) == model


def test_more_ranks_shrink_the_states_and_not_the_activations():
    one, eight = (trained_memory(STUDENT_3B, "bfloat16", "full", Work(2, 4096), n, replace(STUDENT)) for n in (1, 8))
    assert one.device["moments"] == 8 * eight.device["moments"]
    assert one.passing["activations"] == eight.passing["activations"]
