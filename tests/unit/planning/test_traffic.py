"""Bytes that travel, against what they must be; `tests/distributed/test_memory_plan.py` counts real collectives."""

from dataclasses import replace

import pytest

from minima.models.shape import ModelShape
from minima.planning.memory import Work
from minima.planning.sharding import STUDENT, TEACHER
from minima.planning.traffic import frozen_traffic, trained_traffic

SHAPE = ModelShape(vocabulary_size=5000, hidden_size=64, intermediate_size=160, num_layers=4, num_heads=4)
WORK = Work(micro_batch_sequences=2, sequence_length=128, accumulation=8)
ALL = replace(TEACHER, persistence_elements=0)


def frozen(placement, offload="none", group=8, ranks_per_node=4, window=1):
    return frozen_traffic(SHAPE, "bfloat16", placement, offload, WORK, group, ranks_per_node, ALL, window=window)


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_a_window_divides_a_sharded_teachers_traffic(offload):
    one, four, seven = (frozen("zero3", offload, window=window) for window in (1, 4, 7))
    for field in ("received", "between_nodes", "from_host", "from_disk"):
        assert getattr(four, field) == getattr(one, field) / 4
        assert getattr(seven, field) == getattr(one, field) / 4, "two traversals: seven micro-batches, and one"
    assert (one.from_host > 0, one.from_disk > 0) == (offload != "none", offload == "nvme")


def test_a_teacher_on_each_node_sends_nothing_between_nodes():
    node, world = frozen("zero3_node", group=4), frozen("zero3")
    assert node.between_nodes == 0
    assert world.between_nodes == world.received / 4
    assert world.within_node == 3 * world.between_nodes
    gathered = 2 * (SHAPE.parameters - 5000 * 64)
    assert node.received == pytest.approx(WORK.accumulation * gathered * 3 / 4)
    assert frozen("replica", group=1).received == 0


def test_split_matrices_move_hidden_states_whatever_the_window():
    one, four = (frozen("tensor_parallel", group=4, window=window) for window in (1, 4))
    assert one == four
    hidden = 2 * 64 * 2 * 128 * 4  # bfloat16, width, sequences, tokens, ranks
    assert one.received == 2 * 2 * 4 * hidden * 8 * 3 / 4


def test_a_student_gathers_twice_what_it_cannot_keep_and_scatters_float32():
    sharding = replace(STUDENT, persistence_elements=0, prefetch_elements=0, reuse_elements=0)
    traffic = trained_traffic(SHAPE, "bfloat16", WORK, 8, 4, sharding)
    layer = SHAPE.layer_parameters
    assert traffic.received == pytest.approx(8 * (2 * (2 * SHAPE.parameters - layer) + 4 * SHAPE.parameters) * 7 / 8)
    kept = trained_traffic(SHAPE, "bfloat16", WORK, 8, 4, replace(sharding, prefetch_elements=1))
    saved = 2 * 8 * (SHAPE.parameters - 5000 * 64 - layer) * 7 / 8
    assert traffic.received - kept.received == pytest.approx(saved), "all is kept but the head"
    assert trained_traffic(SHAPE, "bfloat16", WORK, 1, 1, sharding).received == 0
    offloaded = trained_traffic(SHAPE, "bfloat16", WORK, 8, 4, replace(sharding, offload_optimizer=True))
    assert offloaded.to_host == 4 * SHAPE.parameters / 8 * 9
    assert offloaded.from_host == (4 * 8 + 2) * SHAPE.parameters / 8, "gradients, and at the end the new weights"
