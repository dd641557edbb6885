"""One started pair of ranks for all tests here: starting it costs more than most scenarios."""

import pytest

from tests.distributed.ranks import run_scenarios

SCENARIOS = [
    "shard_dtypes", "language_modelling", "distillation", "resume", "checkpoint_weights", "not_finite", "rotary",
    "closing", "resident", "bfloat16_start", "host_reads", "packed", "preference", "preference_host_reads",
    "align_stage", "memory_student", "memory_teacher", "memory_scored", "placements", "nvme_refused", "shared_memory",
    "recomputation", "compiled", "offloaded_optimizer", "rank_0_alone",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two-ranks")


@pytest.fixture(scope="session")
def two_ranks(folder):
    return run_scenarios(SCENARIOS, folder, timeout_seconds=600)


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory):
    """Four ranks that believe to be on two nodes."""
    names = ["memory_on_nodes", "placements_on_nodes"]
    return run_scenarios(names, tmp_path_factory.mktemp("two-nodes"), 4, 600, per_node=2)
