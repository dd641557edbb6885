"""How a step is computed changes no number: recomputation, compiled layers, an optimiser on the host."""

import pytest
import torch

from minima import cpu_products
from tests.distributed.test_engine import expect_same


def without_time(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("what", ["selective", "full"])
def test_recomputation_changes_no_bit_under_zero3(two_ranks, what, precision):
    runs = two_ranks["recomputation"]
    found, wanted = runs[f"{what}-{precision}"], runs[f"none-{precision}"]
    assert without_time(found["records"]) == without_time(wanted["records"])
    assert found["weights"] == wanted["weights"] and found["held_out"] == wanted["held_out"]


@pytest.mark.parametrize("what", ["none", "selective", "full"])
def test_compiled_layers_give_the_losses_and_gradients_of_plain_ones(two_ranks, what):
    found, wanted = two_ranks["compiled"][what], two_ranks["compiled"]["eager"]
    expect_same(found["records"], wanted["records"])
    assert found["held_out"] == pytest.approx(wanted["held_out"], rel=1e-5)


def test_compiled_layers_have_no_graph_break_and_one_graph_serves_them_all(two_ranks):
    runs = two_ranks["compiled"]
    assert runs["graph_breaks"] == 0
    # The student's layers with gradients and without; in the first run those of the teacher, too. Before PyTorch 2.13
    # a later run may take what an earlier one has compiled.
    assert runs["none"]["graphs"] >= 1
    assert all(runs[what]["graphs"] <= most for what, most in (("none", 3), ("selective", 2), ("full", 2)))


def test_sharded_models_and_the_loss_multiply_float32_with_the_faster_library(two_ranks):
    runs = {what: two_ranks["compiled"][what]["stock_products"] for what in ("eager", "none", "selective", "full")}
    linears = 14  # of the student, each with three products
    if cpu_products.is_faster(torch.ones(1)):
        assert runs == dict.fromkeys(runs, 0)
    else:
        assert all(count >= 3 * linears for count in runs.values())


@pytest.mark.parametrize("scenario", ["recomputation", "compiled"])
def test_no_gathered_weight_outlives_a_forward_pass(two_ranks, scenario):
    runs = {what: run for what, run in two_ranks[scenario].items() if isinstance(run, dict)}
    assert {what: run["outlive"] for what, run in runs.items()} == dict.fromkeys(runs, 0)


def test_an_optimiser_on_the_host_gives_the_same_steps_and_resumes_to_the_bit(two_ranks):
    runs = two_ranks["offloaded_optimizer"]
    found = runs["offloaded"]
    assert found["offload"] and found["fused"]
    expect_same(found["records"], runs["plain"]["records"])
    assert without_time(found["resumed"]) == without_time(found["records"][3:])
    assert found["resumed_weights"] == found["weights"]
