"""Held-out preferences over every pair once, and reference values that are kept by content."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minima.engine import distributed
from minima.engine.objectives.preference import Preference
from minima.engine.reference import HostReference
from minima.errors import DataError, DiskFull, MinimaError, NotFinite, StageError, TokenizerMismatch
from minima.evaluation import kept_reference
from minima.evaluation.kept_reference import keep_references
from minima.evaluation.preference import evaluate_preference
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, model_identity
from tests.pairs import LENGTH, VOCABULARY, PlainHost, log_prob, pair_losses, random_pairs, write_pairs

SHAPE = ModelShape(vocabulary_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
BLOCKS = 7


def source(seed: int, shape: ModelShape = SHAPE) -> RandomSource:
    return RandomSource(shape.to_config() | {"initializer_range": 0.3}, seed)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "held_out", BLOCKS)


@pytest.fixture(autouse=True)
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_scores_are_means_over_all_pairs(store):
    policy, reference = PlainHost(source(1)), PlainHost(source(2))
    objective = Preference(HostReference(reference), beta=0.4)
    found = evaluate_preference(policy, store, objective, micro_batch_sequences=3)
    policy.model.double(), reference.model.double()
    losses = torch.stack(list(pair_losses(policy.model, reference.model, list(range(BLOCKS)), 0, beta=0.4)))
    rewards = torch.tensor([
        [0.4 * (log_prob(policy.model, answer) - log_prob(reference.model, answer)).item() for answer in pair]
        for block in range(BLOCKS)
        for pair in random_pairs(block)
    ])  # fmt: skip
    assert found.pairs == len(losses) == 13
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found.accuracy == pytest.approx((rewards[:, 0] > rewards[:, 1]).double().mean().item())
    assert 0 < found.accuracy < 1
    assert [found.chosen_reward, found.rejected_reward] == pytest.approx(rewards.mean(0).tolist(), rel=1e-5)
    assert found.margin == pytest.approx(found.chosen_reward - found.rejected_reward, rel=1e-5)
    assert set(found.as_dict()) == {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "pairs"}


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 1), (2, 3), (3, 5)])
def test_ranks_and_micro_batch_do_not_change_scores(monkeypatch, store, world_size, micro_batch):
    policy, objective = PlainHost(source(1)), Preference(HostReference(PlainHost(source(2))))
    wanted = evaluate_preference(policy, store, objective, micro_batch_sequences=BLOCKS)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    shares: list[torch.Tensor] = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda sums: shares.append(sums) or torch.ones(6))
        evaluate_preference(policy, store, objective, micro_batch_sequences=micro_batch)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda _: torch.stack(shares).sum(0))
    found = evaluate_preference(policy, store, objective, micro_batch_sequences=micro_batch)
    assert found.as_dict() == pytest.approx(wanted.as_dict(), rel=1e-5)


def test_only_the_first_blocks_when_asked(store, tmp_path):
    policy, objective = PlainHost(source(1)), Preference(HostReference(PlainHost(source(2))))
    first = write_pairs(tmp_path / "first", 2)
    found = evaluate_preference(policy, store, objective, sequences=2)
    assert found == evaluate_preference(policy, first, objective)


def test_what_cannot_be_scored_is_said(store, tmp_path):
    policy, objective = PlainHost(source(1)), Preference(HostReference(PlainHost(source(2))))
    with pytest.raises(DataError, match="holds no block"):
        evaluate_preference(policy, write_pairs(tmp_path / "empty", 0), objective)
    small = PlainHost(source(1, SHAPE.model_copy(update={"vocabulary_size": 40})))
    with pytest.raises(TokenizerMismatch, match="61 token ids"):
        evaluate_preference(small, store, objective)
    policy.head_VE = policy.head_VE * math.nan
    with pytest.raises(NotFinite, match="broken"):
        evaluate_preference(policy, store, objective, name="broken")


def test_blocks_without_a_pair_are_refused(store, monkeypatch):
    monkeypatch.setattr(type(store), "learnt", lambda self, blocks: torch.zeros(len(blocks), LENGTH).bool().numpy())
    with pytest.raises(DataError, match="no preference pair"):
        evaluate_preference(PlainHost(source(1)), store, Preference(HostReference(PlainHost(source(2)))))


class Keeping:
    """Calls of `keep_references` that count how often the model is built."""

    def __init__(self, folder, stores) -> None:
        self.folder, self.stores, self.hosts, self.limits = folder, stores, [], None

    def __call__(self, seed: int = 2, precision: str = "float32", micro_batch: int = 2):
        def build() -> PlainHost:
            self.hosts.append(PlainHost(source(seed)))
            return self.hosts[-1]

        return keep_references(
            self.folder, self.stores, build, model=model_identity(source(seed)), precision=precision,
            micro_batch_sequences=micro_batch, limits=self.limits,
        )  # fmt: skip


@pytest.fixture
def keep(store, tmp_path):
    return Keeping(tmp_path / "cache", [store, write_pairs(tmp_path / "train", 3, seed=50)])


def test_values_are_made_once_for_each_store_model_and_precision(keep, store):
    made = keep()
    assert [len(reference.log_probs_LS) for reference in made] == [BLOCKS, 3]
    assert len(keep.hosts) == 1 and keep.hosts[0].closed and keep.hosts[0].calls == 4 + 2
    again = keep(micro_batch=3)
    assert len(keep.hosts) == 1, "the files are read"
    for old, new in zip(made, again, strict=True):
        assert old.log_probs_LS.equal(new.log_probs_LS)
    other = keep(seed=3)
    assert len(keep.hosts) == 2 and not other[0].log_probs_LS.equal(made[0].log_probs_LS)
    keep(precision="bfloat16")
    assert len(keep.hosts) == 3 and len(list(keep.folder.iterdir())) == 6
    keep.stores = [store]
    keep()
    assert len(keep.hosts) == 3


def test_kept_values_give_the_computed_loss(keep, store):
    policy = PlainHost(source(1))
    kept = evaluate_preference(policy, store, Preference(keep()[0]), micro_batch_sequences=3)
    computed = evaluate_preference(
        policy, store, Preference(HostReference(PlainHost(source(2)))), micro_batch_sequences=2
    )
    assert kept.as_dict() == pytest.approx(computed.as_dict(), rel=1e-5)
    assert abs(kept.margin) > 1e-3


@pytest.mark.parametrize(("world_size", "values"), [(1, 1), (1, 30), (2, 1), (2, 10**6), (3, 30)])
def test_values_are_summed_over_the_ranks_in_parts(keep, tmp_path, monkeypatch, world_size, values):
    """Each rank's own parts, laid one after the other, sum up to what one rank makes of the whole store."""
    made = keep()
    monkeypatch.setattr(kept_reference, "_VALUES_AT_ONCE", values)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    shares = []
    for rank in range(world_size):
        parts: list[torch.Tensor] = []
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda part, parts=parts: parts.append(part) or part)
        Keeping(tmp_path / f"rank{rank}", keep.stores)()
        turn = 2 * world_size * made[0].log_probs_LS.shape[1]
        assert all(part.numel() <= max(values, turn) for part in parts)
        assert len(parts) > 2 or values >= turn, "the store is not summed at once"
        shares.append(torch.cat([part.flatten() for part in parts]))
    torch.testing.assert_close(sum(shares), torch.cat([one.log_probs_LS.flatten() for one in made]))


def test_documents_are_counted_in_parts(keep, monkeypatch):
    made, asked = keep(), []
    document_starts = type(keep.stores[0]).document_starts

    def watched(self, first=0, last=None):
        asked.append((len(self) if last is None else last) - first)
        return document_starts(self, first, last)

    monkeypatch.setattr(kept_reference, "_BLOCKS_AT_ONCE", 2)
    monkeypatch.setattr(type(keep.stores[0]), "document_starts", watched)
    again = keep(precision="bfloat16")
    assert max(asked) == 2
    assert [new.log_probs_LS.shape for new in again] == [old.log_probs_LS.shape for old in made]


def test_of_a_limited_store_only_the_first_blocks_are_run(keep, store):
    keep.limits = [3, None]
    limited = keep()
    assert keep.hosts[0].calls == 2 + 2 and [len(one.log_probs_LS) for one in limited] == [3, 3]
    assert sorted(path.stem.split("-")[-1] for path in keep.folder.iterdir()) == ["3", "3"]
    policy = PlainHost(source(1))
    scores = [
        evaluate_preference(policy, store, Preference(reference), sequences=3)
        for reference in (limited[0], HostReference(PlainHost(source(2))))
    ]
    assert scores[0].as_dict() == pytest.approx(scores[1].as_dict(), rel=1e-5)
    keep.limits = [BLOCKS + 5, None]
    assert len(keep()[0].log_probs_LS) == BLOCKS and keep.hosts[1].calls == 4, "three blocks do not serve seven"


def test_kept_values_of_more_blocks_serve_fewer(keep, caplog):
    keep.stores = keep.stores[:1]
    whole = keep()[0].log_probs_LS
    keep.limits = [2]
    assert keep()[0].log_probs_LS.equal(whole[:2]) and len(keep.hosts) == 1
    assert len(list(keep.folder.iterdir())) == 1
    damage(next(keep.folder.iterdir()), "flipped")
    found = keep()[0].log_probs_LS
    assert len(keep.hosts) == 2 and "damaged" in caplog.text
    torch.testing.assert_close(found, whole[:2, : found.shape[1]])
    caplog.clear()
    assert keep()[0].log_probs_LS.equal(found) and len(keep.hosts) == 2 and not caplog.text


def damage(path, how: str) -> None:
    """One way in which a file can be wrong."""
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    else:
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["reference"]) | {"model": "another"}
        save_file(load_file(path), path, metadata={} if how == "bare" else {"reference": json.dumps(said)})


@pytest.mark.parametrize(
    ("how", "said"), [("cut", "cannot be read"), ("flipped", "damaged"), ("other", "another"), ("bare", "cannot")]
)
def test_a_file_that_is_not_right_is_said_and_made_again(keep, caplog, how, said):
    made = keep()
    paths = sorted(keep.folder.iterdir())
    damage(paths[0], how)
    again = keep()
    assert len(keep.hosts) == 2 and said in caplog.text and paths[0].name in caplog.text
    assert [old.log_probs_LS.equal(new.log_probs_LS) for old, new in zip(made, again, strict=True)] == [True, True]
    caplog.clear()
    keep()
    assert len(keep.hosts) == 2 and not caplog.text


def test_a_reference_that_is_not_finite_leaves_no_file(keep, monkeypatch):
    monkeypatch.setattr(PlainHost, "hidden_states", lambda self, batch: torch.full((2, LENGTH, 16), math.nan))
    with pytest.raises(NotFinite, match="float32"):
        keep()
    assert keep.hosts[0].closed and not keep.folder.exists()


def test_a_full_disk_leaves_no_file(keep, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_reference, "save_tensors", full)
    with pytest.raises(DiskFull):
        keep()
    assert keep.hosts[0].closed and list(keep.folder.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system"), SafetensorError("os error 13")],
)
def test_a_file_that_may_not_be_written_is_told_to_every_rank(keep, monkeypatch, error):
    told: list[MinimaError | None] = []

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    def together(met):
        told.append(met)
        raise_together(met)

    raise_together = distributed.raise_together
    monkeypatch.setattr(distributed, "raise_together", together)
    monkeypatch.setattr(kept_reference, "save_tensors", half)
    with pytest.raises(StageError, match=r"reference-.* could not be written \(.*13|.*Read-only"):
        keep()
    assert [type(met) for met in told] == [StageError]
    assert keep.hosts[0].closed and list(keep.folder.iterdir()) == []


def test_a_folder_that_forbids_even_to_clean_up_is_told_to_every_rank(keep, monkeypatch):
    def forbid(*given, **named):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(kept_reference.os, "replace", forbid)
    monkeypatch.setattr(type(keep.folder), "unlink", forbid)
    with pytest.raises(StageError, match="Read-only"):
        keep()
    assert keep.hosts[0].closed


def test_a_folder_in_the_files_place_is_said(keep):
    made = keep()
    path = sorted(keep.folder.iterdir())[0]
    path.unlink()
    path.mkdir()
    (path / "own").touch()
    with pytest.raises(StageError, match="could not be written"):
        keep()
    assert len(made) == 2 and not list(keep.folder.glob(".*"))
