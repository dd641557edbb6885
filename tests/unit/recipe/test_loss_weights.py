"""Weights that follow the step, and what a distil stage says of its loss."""

import itertools

import pytest
from pydantic import ValidationError

from minima.recipe.distillation import Distil
from minima.recipe.loss_weights import WeightSchedule, weight_at

STAGE = {
    "name": "s", "kind": "distil", "model": "a", "teacher": "b", "data": "d", "steps": 10, "learning_rate": 1e-3,
    "batch_sequences": 4, "micro_batch_sequences": 2,
}  # fmt: skip
WSD = {"schedule": "warmup_stable_decay", "start": 0.1, "peak": 0.9, "end": 0.3}


def distil(**changes) -> Distil:
    return Distil.model_validate(STAGE | changes)


def problem(**changes) -> str:
    with pytest.raises(ValidationError) as caught:
        distil(**changes)
    return str(caught.value)


def weights(total_steps: int, **schedule) -> list[float]:
    weight = WeightSchedule.model_validate(schedule)
    return [weight.at(step, total_steps) for step in range(total_steps)]


def test_a_linear_weight_begins_and_ends_where_it_says():
    assert weights(5, schedule="linear", start=0.9, end=0.1) == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    assert weights(1, schedule="linear", start=0.9, end=0.1) == [0.9]
    assert weights(3, schedule="linear", start=0.9, end=0.1)[-1] == 0.1  # to the bit


def test_a_weight_warms_up_stays_and_decays():
    found = weights(10, **WSD, warmup_fraction=0.4, decay_fraction=0.2)
    assert found == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, 0.9, 0.9, 0.9, 0.6, 0.3])
    assert weights(4, **WSD, warmup_fraction=0, decay_fraction=0) == [0.9] * 4
    for total in range(1, 12):  # however the shares are rounded
        found = weights(total, **WSD, warmup_fraction=0.5, decay_fraction=0.5)
        assert len(found) == total and all(0.1 <= value <= 0.9 for value in found)
        assert found[-1] == 0.3 or total == 1
        steps = [after > before for before, after in itertools.pairwise(found) if after != before]
        assert steps == sorted(steps, reverse=True)  # up, then down


def test_a_plain_number_is_the_same_at_every_step():
    assert [weight_at(0.25, step, 3) for step in range(3)] == [0.25] * 3


def test_a_constant_schedule_is_the_number():
    stage = distil(hard_weight={"schedule": "constant", "value": 0.3}, soft_weight=0.7)
    assert stage == distil(hard_weight=0.3, soft_weight=0.7) and stage.hard_weight == 0.3
    flat = distil(hard_weight={"schedule": "linear", "start": 0, "end": 0})
    assert flat.hard_weight == 0.0


def test_a_schedule_comes_back_from_what_was_written_down():
    stage = distil(soft_weight=WSD | {"warmup_fraction": 0.1, "decay_fraction": 0.1}, divergence="reverse_kl", top_k=5)
    assert Distil.model_validate(stage.model_dump(mode="json")) == stage
    plain = distil()
    assert Distil.model_validate(plain.model_dump(mode="json")) == plain


def test_what_a_plain_stage_says_of_itself_is_as_it_was():
    """Finished stages of earlier versions are told by what differs from the defaults."""
    chosen = distil().model_dump(mode="json", exclude_defaults=True)
    assert chosen.keys() <= STAGE.keys()

    assert distil().soft_options() == {"divergence": "forward_kl"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hard_weight": {"schedule": "linear", "start": 0.1}}, "without end"),
        ({"hard_weight": {"schedule": "linear", "start": 0.1, "end": 1, "peak": 1}}, "with peak"),
        ({"hard_weight": WSD | {"warmup_fraction": 0.6, "decay_fraction": 0.6}}, "more than all steps"),
        ({"hard_weight": {"schedule": "cosine", "start": 0.1, "end": 1}}, "schedule"),
        ({"hard_weight": {"schedule": "linear", "start": -0.1, "end": 1}}, "greater than or equal to 0"),
        ({"hard_weight": -1}, "greater than or equal to 0"),
        ({"hard_weight": 0, "soft_weight": 0}, "nothing would be learnt"),
        ({"hard_weight": 0, "soft_weight": {"schedule": "constant", "value": 0}}, "nothing would be learnt"),
        ({"beta": 0.5}, "beta 0.5 and divergence forward_kl"),
        ({"alpha": 0.5, "divergence": "jensen_shannon"}, "alpha 0.5 and divergence jensen_shannon"),
        ({"beta": 1.0, "divergence": "jensen_shannon"}, "less than 1"),
        ({"divergence": "kl"}, "divergence"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"soft_weight": 0, "top_k": 4}, "soft_weight 0 and top_k"),
        ({"soft_weight": 0, "divergence": "reverse_kl"}, "soft_weight 0 and divergence"),
    ],
)
def test_what_could_not_be_meant_is_refused(changes, words):
    assert words in problem(**changes)


def test_options_reach_the_loss_by_name():
    stage = distil(divergence="skew_reverse_kl", alpha=0.2, top_k=64, top_p=0.95)
    assert stage.soft_options() == {"divergence": "skew_reverse_kl", "alpha": 0.2, "top_k": 64, "top_p": 0.95}
