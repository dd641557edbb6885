"""GPUs by name, the time of a step, and what a benchmark says of a GPU."""

import json
from dataclasses import replace

import pytest

from minima.errors import RecipeError
from minima.models.shape import ModelShape
from minima.planning.hardware import GPUS, find_gpu
from minima.planning.throughput import (
    ASSUMED_FRACTION,
    LINK_FRACTION,
    Efficiency,
    measured_efficiency,
    step_time,
    unknown_rates,
)
from minima.planning.traffic import Traffic

H100 = GPUS["h100"]
STUDENT = ModelShape(vocabulary_size=256, hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4)
TEACHER = ModelShape(vocabulary_size=256, hidden_size=128, intermediate_size=320, num_layers=2, num_heads=4)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_names_its_source_and_is_in_one_unit(name):
    gpu = GPUS[name]
    assert "NVIDIA" in gpu.source and gpu.reported_as
    assert 20e9 < gpu.memory_bytes < 300e9
    assert 1e14 < gpu.peak_flops < 3e15 and 1e13 < (gpu.float32_flops or 0) < gpu.peak_flops
    assert 5e11 < gpu.memory_bandwidth < 1e13
    assert gpu.network_bandwidth is None or gpu.network_bandwidth < gpu.node_bandwidth < gpu.memory_bandwidth


@pytest.mark.parametrize(
    ("name", "meant"),
    [("h10", "h100"), ("b20", "b200"), ("a100", "a100-80"), ("l40", "l40s"), ("H100-80GB", "h100")],
)
def test_an_unknown_gpu_names_the_known_ones_and_the_nearest(name, meant):
    with pytest.raises(RecipeError) as error:
        find_gpu(name)
    assert f"did you mean {meant!r}" in error.value.what
    assert all(known in error.value.do for known in GPUS)


def test_numbers_of_a_gpu_can_be_given_by_flag_and_by_file(tmp_path):
    assert find_gpu("H100") == H100
    changed = find_gpu("h100", memory_bytes=94e9, peak_flops=None)
    assert changed == H100.model_copy(update={"memory_bytes": 94_000_000_000})
    path = tmp_path / "mine.yaml"
    path.write_text("{memory_bytes: 32e9, peak_flops: 1e14, memory_bandwidth: 1e12, node_bandwidth: 5e10}")
    mine = find_gpu(str(path))
    assert (mine.name, mine.memory_bytes, mine.network_bandwidth, mine.source) == ("mine", 32e9, None, "the user")


@pytest.mark.parametrize("text", ["memory_bytes: 0", "memory: 80e9", "[1, 2]", "{a: b", "peak_flops: .inf"])
def test_a_file_that_is_no_gpu_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="broken"):
        find_gpu(str(path))
    with pytest.raises(RecipeError, match="memory_bytes"):
        find_gpu("h100", memory_bytes=-1.0)


def test_a_steps_time_is_flops_over_a_share_of_the_peak_and_bytes_over_links():
    traffic = Traffic(received=90e9 + 10e9, between_nodes=10e9, from_host=32e9, to_host=16e9)
    time = step_time(1e15, "bfloat16", [traffic], 1e9, H100, Efficiency(0.5, "a test"))
    assert time is not None
    assert time.compute == pytest.approx(1e15 / (0.5 * 989.4e12))
    assert time.update == pytest.approx(30 * 1e9 / 3.35e12), "30 bytes of a parameter pass the memory"
    assert time.transfer == pytest.approx(90e9 / 450e9 / LINK_FRACTION)
    assert 90e9 / 450e9 == 10e9 / 50e9, "both links take as long"
    network = step_time(1e15, "bfloat16", [replace(traffic, between_nodes=20e9)], 0, H100, Efficiency())
    assert network is not None and network.transfer == pytest.approx(20e9 / 50e9 / LINK_FRACTION), "the slower decides"
    assert time.host == pytest.approx(32e9 / 64e9 / LINK_FRACTION), "both directions at once"
    assert time.seconds == time.compute + time.update + time.transfer + time.host
    assert time.overlapped == time.compute + time.update
    single = step_time(1e15, "float32", [], 0, H100, Efficiency(0.9, "a test", measured=True))
    assert single is not None
    assert single.compute == pytest.approx(1e15 / (ASSUMED_FRACTION * 66.9e12)), "bfloat16 was measured, not this"


def test_the_student_waits_for_the_network_and_the_teacher_for_its_machines_links():
    student = Traffic(received=100e9, between_nodes=20e9)  # 0.18 s within a machine, 0.4 s between machines
    teacher = Traffic(received=90e9)  # 0.2 s within a machine
    time = step_time(1e15, "bfloat16", [student, teacher], 0, H100, Efficiency())
    assert time is not None
    assert time.transfer == pytest.approx((20e9 / 50e9 + 90e9 / 450e9) / LINK_FRACTION), "one after the other"


def test_what_is_not_published_is_not_made_up():
    card = GPUS["l40s"]
    traffic = Traffic(received=2.0, between_nodes=1.0)
    assert unknown_rates(card, "bfloat16", traffic) == ["network_bandwidth"]
    assert step_time(1e12, "bfloat16", [traffic], 0, card, Efficiency()) is None
    assert step_time(1e12, "bfloat16", [Traffic(received=2.0)], 0, card, Efficiency()) is not None
    bare = card.model_copy(update={"float32_flops": None, "host_bandwidth": None})
    assert unknown_rates(bare, "float32", Traffic(to_host=1.0)) == ["float32_flops", "host_bandwidth"]


def result(**changes) -> dict:
    """As `tools/bench_distil.py` writes it, as far as it is read."""
    rows = [
        {"name": "a:minima bfloat16", "group": "a", "what": "minima", "precision": "bfloat16", "status": "measured",
         "tokens_per_second": 5e6},
        {"name": "b:minima bfloat16", "group": "b", "what": "minima", "precision": "bfloat16", "status": "measured",
         "tokens_per_second": 9e6},
        {"name": "b:trl", "group": "b", "what": "trl", "precision": "bfloat16", "status": "measured",
         "tokens_per_second": 8e6},
    ]  # fmt: skip
    shapes = {"student": STUDENT.model_dump(), "teacher": TEACHER.model_dump(), "sequence_tokens": 128, "ranks": 1}
    shapes |= {"activation_checkpointing": "full"}
    return {
        "rows": rows,
        "shapes": shapes | changes.pop("shapes", {}),
        "environment": {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-01"} | changes.pop("environment", {}),
    } | changes


def write(folder, name, found):
    (folder / name).write_text(json.dumps(found))
    return folder / name


def test_a_measured_gpu_calibrates_the_share_of_its_peak(tmp_path):
    path = write(tmp_path, "x.json", result())
    found = measured_efficiency(H100, [path])
    assert found is not None and found.measured and "9,000,000 tokens/s" in found.reason and "x.json" in found.reason
    forward = STUDENT.forward_flops_per_token(128)
    executed = 4 * forward - 2 * 256 * 64 + TEACHER.forward_flops_per_token(128)  # layers run forward once more
    assert found.fraction == pytest.approx(9e6 * executed / 989.4e12)
    assert found.against_assumed == pytest.approx(found.fraction / ASSUMED_FRACTION)
    rows = result()["rows"]
    rows[1]["status"] = "failed"
    other = measured_efficiency(H100, [write(tmp_path, "y.json", result(rows=rows))])
    assert other is not None and other.fraction == pytest.approx(found.fraction * 5 / 9), "the fixed micro-batch then"


@pytest.mark.parametrize(
    "found",
    [
        result(environment={"gpu": "NVIDIA H200"}),
        result(environment={"gpu": "NVIDIA H100 PCIe"}),
        result(environment={"gpu": None}),
        result(shapes={"ranks": 2}),
        result(rows=[]),
        {"rows": "of another benchmark"},
        [],
    ],
)
def test_what_was_measured_elsewhere_or_otherwise_does_not_calibrate(tmp_path, found):
    path = write(tmp_path, "x.json", found)
    (tmp_path / "broken.json").write_text("{")
    assert measured_efficiency(H100, [path, tmp_path / "broken.json", tmp_path / "missing.json"]) is None


def test_the_newest_measurement_counts(tmp_path):
    old, new = result(), result(environment={"date": "2026-02-01"})
    new["rows"] = [row | {"tokens_per_second": 1e6} for row in new["rows"]]
    paths = [write(tmp_path, "a.json", new), write(tmp_path, "b.json", old)]
    found = measured_efficiency(H100, paths)
    assert found is not None and "a.json" in found.reason
