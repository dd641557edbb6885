"""Two real ranks under ZeRO-3 against one plain process, against themselves resumed, and against bad numbers."""

import ctypes
import json

import pytest
from safetensors.torch import load_file, save_file

from minima.engine.checkpoint.shards import CheckpointSource
from minima.engine.checkpoint.store import verify_checkpoint
from minima.engine.weights import open_weights
from minima.errors import CheckpointError, StoreCorrupted
from minima.models.layout import complete_steps, step_folder
from minima.models.stock import build_empty
from tests.distributed.ranks import run_scenarios
from tests.distributed.reference import plain_training
from tests.distributed.tiny import teacher_source, training

# One step in float32: the order of a sum over ranks and chunks differs, nothing else. The mean bound catches a drift
# that each step's own bound would let through.
PER_STEP, MEAN = 3e-6, 1e-6


@pytest.fixture(scope="module")
def one_rank(two_ranks, folder):
    return run_scenarios(["load_elsewhere", "distillation_alone"], folder, world_size=1)


def expect_same(found: list[dict], wanted: list[dict], per_step: float = PER_STEP, mean: float = MEAN) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for name in ("loss", "gradient_norm"):
        pairs = zip(found, wanted, strict=True)
        differences = [(new[name] - old[name]) / old[name] for new, old in pairs]
        assert max(map(abs, differences)) < per_step, (name, differences)
        assert abs(sum(differences)) / len(differences) < mean, (name, differences)


def test_language_modelling_equals_a_plain_process(two_ranks):
    expect_same(two_ranks["language_modelling"], plain_training(training(), 1.0, 0.0, 1.0))


def test_shards_have_the_precision_that_is_asked_for_on_any_processor(two_ranks):
    for asked, dtypes in two_ranks["shard_dtypes"].items():
        assert dtypes == [f"torch.{asked.split(',')[0]}"], asked


def test_what_rank_0_makes_all_have_and_what_it_refuses_all_refuse(two_ranks):
    """A rank that waited for one that has refused would end with a traceback of its collective's."""
    told = "no text\n  why it matters: it is needed\n  what to do: give some to rank 0"
    assert two_ranks["rank_0_alone"] == [[7, told]] * 2


@pytest.mark.parametrize("micro_batch", ["1", "2", "4"])
def test_distillation_equals_a_plain_process_however_the_batch_is_cut(two_ranks, micro_batch):
    found = two_ranks["distillation"][micro_batch]
    expect_same(found, plain_training(training(), 0.3, 0.7, 2.0))
    record = found[0]
    assert record["loss"] == pytest.approx(0.3 * record["hard"] + 0.7 * record["soft"], rel=1e-6)
    assert 0 < record["kl"] < record["soft"] / 4  # the soft part is temperature^2 x (KL + the teacher's entropy)


@pytest.mark.parametrize("micro_batch", ["1", "8"])
def test_one_rank_and_one_or_eight_micro_batches_are_the_same_too(one_rank, micro_batch):
    expect_same(one_rank["distillation_alone"][micro_batch], plain_training(training(), 0.3, 0.7, 2.0))


def test_packed_rows_equal_their_documents_one_by_one_in_a_plain_process(two_ranks):
    found = two_ranks["packed"]["distillation"]
    expect_same(found, plain_training(training(), 0.3, 0.7, 2.0, packed=True))
    assert found[0]["tokens"] < two_ranks["distillation"]["2"][0]["tokens"]


def test_noise_does_not_depend_on_how_the_batch_is_cut(two_ranks):
    runs = two_ranks["packed"]
    expect_same(runs["noise-1-5"], runs["noise-4-5"])
    assert abs(runs["noise-4-5"][0]["loss"] - runs["noise-4-0"][0]["loss"]) > 1e-4


def test_clipping_and_the_uneven_batch_really_happen(two_ranks):
    records = two_ranks["language_modelling"]
    assert all(record["gradient_norm"] > training().gradient_clip for record in records)
    assert records[0]["tokens"] < 8 * 11, "some rows are padded"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_equals_uninterrupted_to_the_bit(two_ranks, precision):
    run = two_ranks["resume"][precision]
    whole, resumed = run["whole"][3:], run["resumed"]
    assert [record["step"] for record in resumed] == [4, 5, 6]
    for new, old in zip(resumed, whole, strict=True):
        assert {name: new[name] for name in new if name != "seconds"} == {
            name: old[name] for name in old if name != "seconds"
        }
    assert run["resumed_weights"] == run["whole_weights"]


def test_another_number_of_ranks_goes_on_from_the_same_files(two_ranks, one_rank):
    alone = one_rank["load_elsewhere"]
    whole = two_ranks["resume"]["float32"]["whole"][3:]
    assert alone[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-7)
    expect_same(alone, whole)


def test_a_checkpoint_holds_the_weights_that_the_forward_uses(two_ranks, folder):
    found = two_ranks["checkpoint_weights"]
    assert found["held"] == found["stored"]
    source = open_weights_of(folder / "weights")
    assert set(source.names()) == set(found["held"])


def open_weights_of(checkpoints):
    return CheckpointSource(step_folder(checkpoints, complete_steps(checkpoints)[-1]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["NanTeacher", "InfiniteLoss"])
def test_bad_numbers_on_one_rank_stop_all_before_the_update(two_ranks, kind, precision):
    found = two_ranks["not_finite"][f"{kind}-{precision}"]
    assert found["error"].startswith("step 3:") and "last checkpoint" in found["error"]
    assert found["unchanged"]


def test_no_micro_step_asks_the_host_but_the_one_that_updates(two_ranks):
    for counts in two_ranks["host_reads"]:
        assert counts[:-1] == [0] * (len(counts) - 1) and len(counts) == 4
        assert counts[-1] > 0, "the update reads the gradient norm: else nothing was counted"


def test_nothing_is_put_into_the_shared_memory_of_the_machine(two_ranks):
    assert two_ranks["shared_memory"] == []


def test_a_closed_engine_leaves_nothing_in_memory(two_ranks):
    assert two_ranks["closing"] == {"master": False, "moment": False, "shards": False}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_a_closed_models_memory_is_the_machines_again(two_ranks):
    before, with_model, after = two_ranks["resident"]
    assert with_model - before > 80e6, "the measurement saw nothing"
    assert after - before < 30e6


def test_rotary_frequencies_stay_float32_under_bfloat16(two_ranks):
    found = two_ranks["rotary"]
    plain = build_empty(teacher_source().config)
    assert set(found["dtypes"].values()) == {"torch.float32"} and found["weights"] == "torch.bfloat16"
    assert found["inv_freq"] == plain.model.rotary_emb.inv_freq.tolist()


def test_a_bfloat16_student_starts_from_every_digit_of_its_float32_weights(two_ranks):
    assert two_ranks["bfloat16_start"] == 0


def test_flat_reads_cross_the_borders_of_ranks(two_ranks, folder):
    source = open_weights_of(folder / "weights")
    for name in source.names():
        flat = source.read(name).view(-1)
        size = flat.numel()
        for start, stop in [(0, 1), (0, size), (size // 3, size // 2 + 2), (0, 0), (1, 1), (size, size)]:
            assert source.read_flat(name, start, stop).equal(flat[start:stop]), (name, start, stop)


def test_a_flipped_byte_in_a_checkpoint_is_found_and_named(two_ranks, folder):
    checkpoint = step_folder(folder / "bfloat16", 3)
    verify_checkpoint(checkpoint)
    path = sorted(checkpoint.glob("exp_avg-*"))[1]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path)
    with pytest.raises(StoreCorrupted, match=path.name):
        verify_checkpoint(checkpoint)
    weights = sorted(checkpoint.glob("weights-*"))[0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (checkpoint.parent / "stage").mkdir()
    (checkpoint.parent / "stage" / "checkpoints").symlink_to(checkpoint.parent)
    with pytest.raises(StoreCorrupted, match=weights.name):
        open_weights(checkpoint.parent / "stage")


def test_without_its_marker_a_checkpoint_does_not_count(two_ranks, folder, tmp_path):
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert complete_steps(tmp_path / "checkpoints") == []
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_weights(tmp_path)
    marker = json.loads((step_folder(folder / "weights", 6) / "checkpoint.json").read_text())
    assert marker["ranks"] == 2 and marker["step"] == 6
