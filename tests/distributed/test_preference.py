"""Preference optimisation on two real ranks: against one plain process, against kept values, and as a whole stage."""

import math

import pytest

from minima.data.sampler import BlockSampler
from tests.distributed.preference_scenarios import BLOCKS, KINDS, SEED, reference_source, settings_of
from tests.distributed.reference import plain_preference
from tests.distributed.test_engine import expect_same
from tests.pairs import LENGTH, random_pairs

# A preference is a difference of differences of sums over an answer: rounding weighs more than in a mean over tokens.
PER_STEP, MEAN = 2e-5, 1e-5


@pytest.fixture(scope="module")
def plain():
    """Records of one plain process by kind of loss, each answer alone."""
    settings = settings_of()
    total, size = settings.total_sequences(LENGTH, BLOCKS), settings.batch_sequences
    samples = BlockSampler(BLOCKS, settings.seed).indices(0, total).tolist()
    blocks = [samples[start : start + size] for start in range(0, total, size)]
    settings = settings.model_copy(update={"steps": len(blocks)})
    runs = {kind: plain_preference(settings, reference_source(), blocks, SEED, **KINDS[kind]) for kind in KINDS}
    return runs, [sum(len(random_pairs(SEED + block)) for block in step) for step in blocks]


@pytest.mark.parametrize("run", ["sigmoid-1", "sigmoid-2", "sigmoid-4", "sigmoid-2-kept", "ipo-2"])
def test_two_ranks_equal_a_plain_process_however_the_batch_is_cut(two_ranks, plain, run):
    records, pairs = plain
    found = two_ranks["preference"][run]
    expect_same(found, records[run.split("-")[0]], PER_STEP, MEAN)
    assert [record["tokens"] for record in found] == pairs and pairs[-1] < pairs[0], "the last step is half empty"
    assert found[-1]["margin"] == pytest.approx(found[-1]["chosen_reward"] - found[-1]["rejected_reward"], abs=1e-5)


def test_no_micro_step_asks_the_host_but_the_one_that_updates(two_ranks):
    for counts in two_ranks["preference_host_reads"].values():
        assert counts[:-1] == [0] * 3 and counts[-1] > 0


def test_the_stage_starts_at_log_2_and_learns_to_prefer(two_ranks):
    run = two_ranks["align_stage"]["running"]
    steps = [record for record in run["records"] if "loss" in record]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and steps[0]["accuracy"] == 0
    assert steps[-1]["accuracy"] > 0.9 and steps[-1]["margin"] > 0.1 and steps[-1]["loss"] < 0.6
    assert steps[0]["pairs"] > 8 and "valid_tokens" not in steps[0]
    held_out = [record for record in run["records"] if "held_out_loss" in record]
    assert [record["step"] for record in held_out] == [3, 6, 7]
    wanted = {
        f"held_out_{name}" for name in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "pairs")
    }
    assert wanted < set(run["metrics"])
    assert run["metrics"]["held_out_pairs"] == sum(len(random_pairs(100 + block)) for block in range(3))


def test_kept_values_train_the_same_model_and_are_found_again(two_ranks):
    runs = two_ranks["align_stage"]
    assert [runs[name]["built"] for name in ("running", "kept", "found", "against_another")] == [1, 1, 0, 1]
    for name in ("kept", "found"):
        for record, wanted in zip(runs[name]["records"], runs["running"]["records"], strict=True):
            keys = {"step", "loss", "gradient_norm", "margin", "held_out_loss", "held_out_margin"} & set(wanted)
            assert len(keys) > 2
            assert {key: record[key] for key in keys} == pytest.approx({key: wanted[key] for key in keys}, rel=1e-5), (
                name
            )


def test_the_frozen_model_counts_as_work_only_while_it_runs(two_ranks):
    runs = two_ranks["align_stage"]
    work = {
        name: run["records"][0]["model_flops_per_second"] / run["records"][0]["tokens_per_second"]
        for name, run in runs.items()
    }
    assert work["kept"] < work["running"] == pytest.approx(work["kept"] * 4 / 3, rel=1e-6)


def test_ipo_starts_at_the_square_of_its_target(two_ranks):
    steps = [record for record in two_ranks["align_stage"]["against_another"]["records"] if "loss" in record]
    assert steps[0]["loss"] == pytest.approx(1 / (2 * 0.5) ** 2, rel=1e-5) and steps[-1]["loss"] < steps[0]["loss"]
