"""A teacher gives the same wherever its weights live, they lie where they are said to, and a window divides traffic."""

import math

import pytest

from minima.models.stock import parameter_shapes
from tests.distributed.placement_scenarios import NVME_TENSORS, PLACES, large_source
from tests.distributed.reference import plain_training
from tests.distributed.tiny import training

pytestmark = pytest.mark.ranks
SHAPES = parameter_shapes(large_source().config)
MATRICES = {name: math.prod(shape) for name, shape in SHAPES.items() if len(shape) > 1}
WHOLE = 4 * sum(math.prod(shape) for shape in SHAPES.values())
KEPT = WHOLE - 4 * sum(MATRICES.values())  # norms are below the persistence threshold: whole on every rank


@pytest.fixture(scope="module")
def plain():
    return plain_training(training(steps=2), 0.5, 0.5, 1.0, packed=True, teacher_weights=large_source())


def check(records, plain) -> None:
    for found, wanted in zip(records, plain, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=3e-6)
        assert found["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_losses_of_one_plain_process(two_ranks, plain, place, window):
    check(two_ranks["placements"][place][f"records-{window}"], plain)


@pytest.mark.parametrize("place", PLACES)
def test_and_so_on_two_nodes(two_nodes, plain, place):
    check(two_nodes["placements_on_nodes"][place]["records-2"], plain)


@pytest.mark.parametrize("place", ["zero3", "zero3_node", "cpu", "node_cpu", "nvme", "node_nvme"])
def test_a_window_divides_what_is_gathered_and_changes_no_bit(two_ranks, place):
    found = two_ranks["placements"][place]
    assert found["moved-1"] == {"allgather": 4 * found["moved-4"]["allgather"]}
    one, four = ([(r["loss"], r["gradient_norm"]) for r in found[f"records-{window}"]] for window in (1, 4))
    assert one == four
    embeddings = 4 * sum(MATRICES[name] for name in MATRICES if "embed" in name)
    layers = 4 * sum(MATRICES[name] for name in MATRICES if ".layers." in name)
    assert found["moved-4"]["allgather"] == pytest.approx((layers + embeddings) / 2, rel=0.01), "half is one's own"


def test_nothing_is_gathered_of_what_is_whole_or_split(two_ranks):
    places = two_ranks["placements"]
    assert places["replica"]["moved-1"] == {}
    split = places["tensor_parallel"]["moved-1"]
    assert split == places["tensor_parallel"]["moved-4"], "activations travel, and a window does not make them fewer"
    assert set(split) == {"allgather", "allreduce"} and split["allgather"] < split["allreduce"] < WHOLE / 20


@pytest.mark.parametrize(
    ("place", "ranks"),
    [("replica", 1), ("zero3", 4), ("zero3_node", 2), ("cpu", 4), ("node_cpu", 2), ("tensor_parallel", 2)],
)
def test_each_of_four_ranks_holds_its_share_and_no_more(two_nodes, place, ranks):
    found = two_nodes["placements_on_nodes"][place]
    wanted = WHOLE / ranks if place == "replica" else (WHOLE - KEPT) / ranks + KEPT * (1 + 1 / ranks)
    for held in found["held"]:  # on a CPU the host's memory is the device's
        assert sum(held.values()) == held["device"] == pytest.approx(wanted, rel=0.01)
    assert found["live"] == pytest.approx(found["held"][0]["device"], abs=2000), "no tensor beside those"


@pytest.mark.parametrize(
    ("run", "place", "ranks"),
    [("two", "nvme", 2), ("two", "node_nvme", 2), ("four", "nvme", 4), ("four", "node_nvme", 2)],
)
def test_shards_on_nvme_are_files_and_go_with_the_teacher(two_ranks, two_nodes, run, place, ranks):
    found = (two_ranks["placements"] if run == "two" else two_nodes["placements_on_nodes"])[place]
    large = max(MATRICES.values()) // ranks * 4
    assert [held["nvme"] for held in found["held"]] == [NVME_TENSORS * large] * (2 if run == "two" else 4)
    assert len(found["files"]) == NVME_TENSORS * len(found["held"])
    assert sum(found["files"]) >= sum(held["nvme"] for held in found["held"])
    assert found["left_files"] == []


@pytest.mark.parametrize("place", PLACES)
def test_a_closed_teacher_leaves_nothing(two_ranks, place):
    found = two_ranks["placements"][place]
    assert found["left"] < 1000
    assert found["mpu"] == "None", "AutoTP's groups would be taken for those of the next engine"


def test_a_folder_that_cannot_hold_shards_is_refused_on_every_rank(two_ranks):
    found = two_ranks["nvme_refused"]
    for name, why in {"file": "Not a directory", "none": "No such file", "occupied": "rank1"}.items():
        first, second = found[name]
        assert first == second and "its shards cannot be written to" in first and why in first
        assert "set nvme_path to a writable folder" in first
    assert found["left"] == ["rank1"], "what was there, and nothing of ours"
