"""Parts of the memory plan by hand; `tests/distributed/test_memory_plan.py` compares it with real ranks."""

from dataclasses import replace

import pytest

from minima.models.shape import ModelShape
from minima.planning.memory import Work, frozen_memory, scored_memory, trained_memory
from minima.planning.sharding import STUDENT, TEACHER, gathered_ahead, shard_elements

DEEP = ModelShape(vocabulary_size=100, hidden_size=256, intermediate_size=1024, num_layers=8, num_heads=4)
WIDE = ModelShape(vocabulary_size=32_000, hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4)
LARGEST = 256 * 1024  # tensor of DEEP


@pytest.mark.parametrize(
    ("precision", "taught", "chunks"),
    [("float32", True, 2), ("float32", False, 1), ("bfloat16", True, 2.5), ("bfloat16", False, 1.5)],
)
@pytest.mark.parametrize("tokens", [256, 512, 4096])
def test_a_loss_holds_a_few_chunks_of_float32_logits(precision, taught, chunks, tokens):
    """With a teacher, as many as `tests/unit/losses/test_loss_memory.py` measures."""
    work = Work(micro_batch_sequences=1, sequence_length=tokens, chunk_tokens=512)
    memory = trained_memory(WIDE, precision, "full", work, 1, STUDENT, taught=taught)
    assert memory.passing["loss or layer"] == chunks * 4 * min(tokens, 512) * 32_000


@pytest.mark.parametrize("at_once", [10**9, 10**6])
def test_an_update_needs_a_second_copy_of_the_gradients_that_it_takes_at_once(at_once):
    """Here that is more than the backward pass takes, which is over by then."""
    sharding = replace(STUDENT, reduce_bucket_elements=1000, sub_group_elements=at_once)
    memory = trained_memory(DEEP, "bfloat16", "full", Work(1, 16), 1, sharding)
    assert memory.passing_bytes == 4 * min(DEEP.parameters, at_once + LARGEST)


def test_page_locked_gradients_take_powers_of_two():
    sharding = replace(STUDENT, offload_optimizer=True, pinned=True, sub_group_elements=3_000_000)
    memory = trained_memory(DEEP, "bfloat16", "full", Work(1, 16), 1, sharding)
    assert 2**25 < 4 * DEEP.parameters < 2**26 and 2**23 < 4 * DEEP.parameters / 3 < 2**24
    assert memory.host["gradients"] == 2**26 + 3 * 2**24, "where they add up, and where three groups read them"


def test_a_frozen_layer_holds_the_gate_the_output_and_the_product_of_its_mlp():
    work = Work(micro_batch_sequences=2, sequence_length=128)
    memory = frozen_memory(DEEP, "bfloat16", "replica", "none", work, 1, TEACHER)
    assert memory.passing["activations"] == 2 * work.tokens * (2 * 256 + 3 * 1024)


def test_at_least_a_layer_of_a_trained_model_is_gathered_ahead():
    large = DEEP.model_copy(update={"intermediate_size": 100_000})
    assert gathered_ahead(STUDENT, DEEP).prefetch_elements == 50_000_000
    assert gathered_ahead(STUDENT, large).prefetch_elements == large.layer_parameters > 50_000_000
    none = replace(STUDENT, prefetch_elements=0)
    assert gathered_ahead(none, large) == none


def test_a_split_teacher_reads_the_sequences_of_all_its_ranks():
    work = Work(micro_batch_sequences=2, sequence_length=128)
    shape = DEEP.model_copy(update={"intermediate_size": 512})
    memory = frozen_memory(shape, "bfloat16", "tensor_parallel", "none", work, 4, TEACHER)
    norm = 256 * (4 + 4 + 2)  # a float32 copy and its product, and the output: per token more than a fourth of an MLP
    assert memory.passing["activations"] == 4 * work.tokens * (2 * 256 + norm)


def test_small_tensors_lie_whole_on_every_rank_beside_their_shards():
    for threshold, elements in ((256, 17 * 256), (10**9, DEEP.parameters)):  # two norms in each layer, and the last one
        sharding = replace(STUDENT, persistence_elements=threshold)
        for ranks, times in ((1, 0), (2, 1)):
            trained = trained_memory(DEEP, "float32", "full", Work(1, 16), ranks, sharding)
            frozen = frozen_memory(DEEP, "bfloat16", "zero3", "none", Work(1, 16), ranks, sharding)
            assert trained.device["persistent"] == 4 * elements * times
            assert frozen.device["persistent"] == 2 * elements * times


def test_a_rank_holds_a_part_of_every_tensor_rounded_up():
    assert shard_elements(DEEP, 2) == DEEP.parameters / 2
    assert shard_elements(DEEP, 10**9) == 8 * (4 + 3 + 2) + 3, "one element of each"


def test_a_scored_model_on_the_host_takes_no_device_but_what_is_gathered():
    work = Work(micro_batch_sequences=1, sequence_length=512)
    one, two = (scored_memory(WIDE, "bfloat16", work, ranks, STUDENT) for ranks in (1, 2))
    head = 2 * 32_000 * 64  # gathered while the loss runs, which here takes more than the layers
    assert two.passing["activations"] - one.passing["activations"] == head
    there = scored_memory(WIDE, "bfloat16", work, 1, replace(STUDENT, offload_weights="cpu"))
    assert there.passing == two.passing and there.resident_bytes == 0
    assert there.host_bytes == one.resident_bytes == 2 * WIDE.parameters


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_a_single_rank_gathers_what_it_fetches_from_its_host(offload):
    one, two = (frozen_memory(DEEP, "bfloat16", "zero3_node", offload, Work(1, 16), group, TEACHER) for group in (1, 2))
    assert one.passing["gathered"] == two.passing["gathered"] > 0
    alone = frozen_memory(DEEP, "bfloat16", "zero3_node", "none", Work(1, 16), 1, TEACHER)
    assert alone.passing["gathered"] == 0
    if offload == "nvme":
        assert one.host_bytes == 2 * 5 * 100_000_000, "DeepSpeed's five buffers, whatever the model's size"
