"""Preference losses against TRL's own code on the same tensors, and against naive float64: values and gradients."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minima.errors import MinimaError
from minima.losses import document_sums, preference_loss

# Labels of the chosen and the rejected answer of each pair, by sequence; prompts have one token more than pairs before.
SEQUENCES = [[(5, 2), (1, 7), (4, 4)], [(3, 6)]]
LENGTH = 45


class Packed:
    """Two packed sequences, with padding documents: each token's log-probability, and where the answers lie."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.log_probs_BT = -3 * torch.rand(2, LENGTH, generator=generator)
        self.documents_BT = torch.zeros(2, LENGTH, dtype=torch.int64)
        self.learnt_BT = torch.zeros(2, LENGTH, dtype=torch.bool)
        self.answers: list[tuple[int, slice]] = []  # row and place; chosen and rejected of each pair in turn
        for row, pairs in enumerate(SEQUENCES):
            place = 0
            for number, tokens in enumerate(length for pair in pairs for length in pair):
                answer = slice(place + 2 + number // 2, place + 2 + number // 2 + tokens)
                self.documents_BT[row, place : answer.stop] = number
                self.learnt_BT[row, answer] = True
                self.answers.append((row, answer))
                place = answer.stop
            self.documents_BT[row, place:] = 2 * len(pairs)
        self.reference = [float(-20 * torch.rand((), generator=generator)) for _ in self.answers]
        self.lengths = [answer.stop - answer.start for _, answer in self.answers]

    def sums(self, log_probs_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Policy, reference and lengths as the loss takes them."""
        policy_BS = document_sums(log_probs_BT * self.learnt_BT, self.documents_BT, 8)
        lengths_BS = document_sums(self.learnt_BT.long(), self.documents_BT, 8)
        reference_BS = torch.full((2, 8), 7.0)  # of what is no answer: must not matter
        numbers = [0, 0]
        for (row, _), value in zip(self.answers, self.reference, strict=True):
            reference_BS[row, numbers[row]] = value
            numbers[row] += 1
        return policy_BS, reference_BS, lengths_BS


def trl_loss(packed: Packed, log_probs_BT: Tensor, pairs: list[int], **settings) -> tuple[Tensor, dict[str, list]]:
    """TRL's mean loss and metrics of some pairs: its trainer's own method, with the trainer around it left out."""
    from trl import DPOTrainer

    answers = [packed.answers[2 * pair + side] for side in (0, 1) for pair in pairs]  # all chosen, then all rejected
    reference = torch.tensor([packed.reference[2 * pair + side] for side in (0, 1) for pair in pairs])
    longest = max(packed.lengths)
    rows = [
        torch.nn.functional.pad(log_probs_BT[row, place], (0, longest - (place.stop - place.start)))
        for row, place in answers
    ]
    mask = torch.tensor([[0] + [1] * (p.stop - p.start) + [0] * (longest - p.stop + p.start) for _, p in answers])
    none = torch.zeros(len(rows), longest)
    given = SimpleNamespace(log_probs=torch.stack(rows), entropy=none, mean_logits=none, is_top1=none.bool())
    trainer = DPOTrainer.__new__(DPOTrainer)
    same = SimpleNamespace(device="cpu", gather_for_metrics=lambda tensor: tensor, gather=lambda tensor: tensor)
    attributes = {
        "model": SimpleNamespace(training=True), "accelerator": same, "aux_loss_enabled": False, "ld_alpha": None,
        "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "loss_weights": [1.0], "use_weighting": False,
        "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1, **settings,
    }  # fmt: skip
    for name, value in attributes.items():
        setattr(trainer, name, value)
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    return trainer._compute_loss(lambda **_: given, inputs, False), trainer._metrics["train"]


# TRL's name of the same loss. Its `aot` sorts within a batch, which changes nothing in batches of one pair; what is
# left is the sigmoid loss with label smoothing, which its `sigmoid` no longer has.
CASES = [
    ({"loss": "sigmoid", "beta": 0.1}, "sigmoid"),
    ({"loss": "sigmoid", "beta": 0.7}, "sigmoid"),
    ({"loss": "sigmoid", "beta": 0.3, "length_normalised": True}, "sigmoid_norm"),
    ({"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.2}, "aot"),
    ({"loss": "ipo", "beta": 0.1, "length_normalised": True}, "ipo"),
    ({"loss": "ipo", "beta": 0.9, "length_normalised": True}, "ipo"),
]


@pytest.mark.parametrize(("settings", "name"), CASES)
def test_values_and_gradients_are_those_of_trl(settings, name):
    packed = Packed()
    ours, theirs = (packed.log_probs_BT.clone().requires_grad_() for _ in range(2))
    loss = preference_loss(*packed.sums(ours), **settings)
    assert loss.count == 4
    (loss.total / loss.count).backward()
    trl = {"loss_types": [name], "beta": settings["beta"], "label_smoothing": settings.get("label_smoothing", 0.0)}
    batches = [[pair] for pair in range(4)] if name == "aot" else [[0, 1, 2, 3]]
    means = [trl_loss(packed, theirs, pairs, **trl) for pairs in batches]
    total = torch.stack([mean for mean, _ in means]).mean()
    total.backward()
    torch.testing.assert_close(loss.total / loss.count, total, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert ours.grad[packed.learnt_BT].all() and not ours.grad[~packed.learnt_BT].any()
    if name == "sigmoid":
        metrics = means[0][1]
        wanted = {
            "accuracy": "rewards/accuracies", "margin": "rewards/margins",
            "chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected",
        }  # fmt: skip
        for part, key in wanted.items():
            assert loss.parts[part].item() / 4 == pytest.approx(metrics[key][0], rel=1e-5), part
        assert 0 < loss.parts["accuracy"] < 4, "a test in which every pair is right, or wrong, would see less"


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.3), ("ipo", 0.0)])
def test_values_gradients_and_rewards_equal_naive_float64(kind, smoothing, normalised):
    packed, beta = Packed(), 0.4
    ours, exact = packed.log_probs_BT.clone().requires_grad_(), packed.log_probs_BT.double().requires_grad_()
    loss = preference_loss(
        *packed.sums(ours), loss=kind, beta=beta, label_smoothing=smoothing, length_normalised=normalised
    )
    loss.total.backward()
    total, wanted = torch.zeros((), dtype=torch.float64), defaultdict(float)
    for pair in range(4):
        ratios = []
        for side in (2 * pair, 2 * pair + 1):
            row, place = packed.answers[side]
            ratio = exact[row, place].sum() - packed.reference[side]
            ratios.append(ratio / (packed.lengths[side] if normalised else 1))
        h = ratios[0] - ratios[1]
        if kind == "ipo":
            total = total + (h - 1 / (2 * beta)) ** 2
        else:
            p = torch.sigmoid(beta * h)
            total = total - (1 - smoothing) * p.log() - smoothing * (1 - p).log()
        wanted["accuracy"] += float(ratios[0] > ratios[1])
        wanted["margin"] += beta * h.item()
        wanted["chosen_reward"] += beta * ratios[0].item()
        wanted["rejected_reward"] += beta * ratios[1].item()
    total.backward()
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    assert {name: value.item() for name, value in loss.parts.items()} == pytest.approx(wanted, rel=1e-5)
    assert not any(value.requires_grad for value in loss.parts.values())


def test_a_policy_that_is_its_reference_has_a_loss_of_log_2_and_no_preference():
    packed = Packed()
    policy_BS, _, lengths_BS = packed.sums(packed.log_probs_BT)
    loss = preference_loss(policy_BS, policy_BS, lengths_BS, label_smoothing=0.1)
    assert loss.total.item() / 4 == pytest.approx(math.log(2), rel=1e-7)
    assert not any(value.any() for value in loss.parts.values())


def test_a_pair_without_labels_in_one_answer_counts_nothing():
    packed = Packed()
    packed.learnt_BT[0, packed.answers[2][1]] = False  # the chosen answer of the second pair
    policy_BS, reference_BS, lengths_BS = packed.sums(packed.log_probs_BT.requires_grad_())
    loss = preference_loss(policy_BS, reference_BS, lengths_BS)
    loss.total.backward()
    assert loss.count == 3
    assert not packed.log_probs_BT.grad[0, packed.answers[3][1]].any(), "its rejected answer is not learnt from"
    kept = torch.tensor([0, 1, 4, 5])
    others = [preference_loss(*(sums[:1, kept] for sums in (policy_BS, reference_BS, lengths_BS)))]
    others.append(preference_loss(*(sums[1:] for sums in (policy_BS, reference_BS, lengths_BS))))
    assert loss.total.item() == pytest.approx(sum(other.total.item() for other in others), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "hinge"}, "loss 'hinge'"),
        ({"beta": 0.0}, "beta 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing 0.1"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings, said):
    packed = Packed()
    with pytest.raises(MinimaError, match=said):
        preference_loss(*packed.sums(packed.log_probs_BT), **settings)


def test_documents_that_are_not_pairs_or_not_the_same_are_refused():
    sums = Packed().sums(Packed().log_probs_BT)
    odd = [values_BS[:, :-1] for values_BS in sums]
    for wrong in (odd, [sums[0], odd[1], sums[2]], [sums[0], sums[1], sums[2][:1]], [values[0] for values in sums]):
        with pytest.raises(MinimaError, match="lengths"):
            preference_loss(*wrong)


def test_sums_go_to_their_documents_in_float64():
    values_BT = torch.full((1, 20_000), 0.1)
    values_BT[0, 0] = 1000.0
    documents_BT = torch.zeros(1, 20_000, dtype=torch.int64)
    documents_BT[0, -1] = 2
    sums_BS = document_sums(values_BT, documents_BT, 4)
    assert sums_BS.dtype == torch.float32
    wanted = values_BT[0, :-1].double().sum().float()
    assert sums_BS.tolist() == [[wanted.item(), 0.0, values_BT[0, -1].item(), 0.0]]
    assert document_sums(documents_BT, documents_BT, 3).tolist() == [[0, 0, 2]]
