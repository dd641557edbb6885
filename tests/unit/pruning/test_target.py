"""The published arithmetic of a target, and every shape that is refused before data is read."""

import subprocess
import sys

import pytest

from minima.errors import ShapeError
from minima.models.shape import ModelShape
from minima.pruning.target import check_norm_compensation, layer_range, plan_target, width_percent
from minima.recipe.pruning import PruneTarget

LLAMA_7B = ModelShape(
    vocabulary_size=49216, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, norm_epsilon=1e-5
)
SMOLLM = ModelShape(
    vocabulary_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_key_value_heads=3,
    tied=True,
)
PYTHIA = ModelShape(
    family="gpt_neox", vocabulary_size=50304, hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12
)
PAPER = {10: 5, 20: 11, 30: 16, 40: 23, 50: 29, 60: 37, 70: 45, 80: 55, 85: 61, 90: 68, 95: 78, 96: 80, 97: 83, 98: 86}


@pytest.mark.parametrize(("sparsity", "expected"), [*PAPER.items(), (99, 90), (0, 0)])
def test_width_percent_is_the_published_table(sparsity, expected):
    assert width_percent(sparsity) == expected


def test_the_published_student():
    target = PruneTarget(num_layers=24, hidden_size=3072, num_heads=24, intermediate_size=8192)
    plan = plan_target(LLAMA_7B, target)
    assert plan.student.parameters == 3_020_442_624
    assert plan.student.head_size == 128
    assert plan.student.layer_parameters == 4 * 3072**2 + 3 * 3072 * 8192 + 2 * 3072


@pytest.mark.parametrize("shape", [LLAMA_7B, PYTHIA], ids=["llama", "gpt_neox"])
@pytest.mark.parametrize("sparsity", [*range(10, 100, 10), 95])
def test_a_sparsity_gives_a_shape_that_loads_and_comes_close(shape, sparsity):
    plan = plan_target(shape, PruneTarget(sparsity=sparsity))
    assert plan.width_percent == width_percent(sparsity)
    # Heads are whole and the width has to suit them: half a head of 12 is 4 points of p', 8 points of p at most.
    removed_percent = 100 * (1 - plan.student.layer_parameters / shape.layer_parameters)
    assert removed_percent == pytest.approx(sparsity, abs=3 if shape is LLAMA_7B else 8)
    assert plan.student.intermediate_size % 8 == 0


def test_sparsity_zero_removes_nothing():
    assert plan_target(SMOLLM, PruneTarget(sparsity=0)).student == SMOLLM


def test_groups_go_whole():
    plan = plan_target(SMOLLM, PruneTarget(num_heads=6, hidden_size=384))
    assert (plan.student.num_heads, plan.student.num_key_value_heads, plan.student.head_size) == (6, 2, 64)


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        (LLAMA_7B, {"num_layers": 33}, "num_layers 33"),
        (LLAMA_7B, {"hidden_size": 8192}, "hidden_size 8192"),
        (LLAMA_7B, {"num_heads": 64}, "num_heads 64"),
        (LLAMA_7B, {"intermediate_size": 20000}, "intermediate_size 20000"),
        (LLAMA_7B, {"hidden_size": 3000, "num_heads": 7}, "does not divide"),
        (SMOLLM, {"num_heads": 4}, "share each key-value head"),
        (PYTHIA, {"hidden_size": 512}, "does not divide"),
        (PYTHIA, {"hidden_size": 384}, "fill the width"),
        (PYTHIA, {"num_heads": 6}, "fill the width"),
    ],
)
def test_impossible_shapes_are_refused(shape, target, message):
    with pytest.raises(ShapeError, match=message):
        plan_target(shape, PruneTarget(**target))


def test_global_selection_is_refused_where_padded_heads_cannot_load():
    with pytest.raises(ShapeError, match="global selection"):
        plan_target(PYTHIA, PruneTarget(sparsity=50), selection="global")
    plan = plan_target(PYTHIA, PruneTarget(num_heads=6, intermediate_size=1024), selection="global")
    assert (plan.num_groups, plan.num_neurons) == (6, 1024)
    assert plan.student == PYTHIA


def test_norm_compensation_needs_rms_norms():
    check_norm_compensation(LLAMA_7B, "rms")
    check_norm_compensation(PYTHIA, "none")
    with pytest.raises(ShapeError, match="LayerNorm"):
        check_norm_compensation(PYTHIA, "rms")


@pytest.mark.parametrize(
    ("layers", "keep", "expected"),
    [(32, 24, range(4, 28)), (5, 5, range(5)), (5, 2, range(1, 3)), (5, 4, range(4)), (4, 1, range(1, 2))],
)
def test_symmetric_depth(layers, keep, expected):
    assert layer_range(layers, keep) == expected
    assert len(layer_range(layers, keep)) == keep


def test_planning_a_target_imports_no_torch():
    code = "import sys, minima.pruning.target, minima.models.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("shape", [LLAMA_7B, SMOLLM, LLAMA_7B.model_copy(update={"num_heads": 40, "hidden_size": 5120,
                                   "num_key_value_heads": 40})])  # fmt: skip
@pytest.mark.parametrize("sparsity", [10, 30, 40, 60, 85, 95])
def test_a_global_sparsity_gives_a_checkpoint_that_loads_and_is_no_larger(shape, sparsity):
    plan = plan_target(shape, PruneTarget(sparsity=sparsity), selection="global")
    assert plan.student.num_heads == shape.num_heads and plan.student.hidden_size % plan.student.num_heads == 0
    assert plan.student.layer_parameters <= shape.layer_parameters
    assert abs(plan.student.hidden_size / shape.hidden_size - 1 + plan.width_percent / 100) < 0.06
