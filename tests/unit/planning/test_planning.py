"""The arithmetic of a run, and the dry run that shows it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minima.errors import CheckpointError, RecipeError, ShapeError, VocabularyMismatch
from minima.models.shape import ModelShape
from minima.planning.arithmetic import check_batch, checkpoint_bytes, plan_training, training_flops
from minima.planning.units import flops_text, size_text
from minima.recipe.loading import load_recipe
from minima.recipe.training import Training
from minima.stages.preview.dry_run import dry_run_text


def training(**changes) -> Training:
    given = {"batch_sequences": 8, "micro_batch_sequences": 2, "learning_rate": 1e-3} | changes
    return Training(**given)


def test_tokens_are_whole_blocks_and_the_last_step_is_filled():
    plan = plan_training(training(tokens=1000), 32, None)
    assert plan is not None
    assert (plan.sequences, plan.steps, plan.last_step_sequences, plan.masked_sequences) == (31, 4, 7, 1)
    assert plan.tokens + plan.leftover_tokens == 1000


@pytest.mark.parametrize(("tokens", "last", "masked"), [(8 * 32, 8, 0), (9 * 32, 1, 7), (16 * 32 + 31, 8, 0)])
def test_last_step(tokens, last, masked):
    plan = plan_training(training(tokens=tokens), 32, None)
    assert plan is not None
    assert (plan.last_step_sequences, plan.masked_sequences) == (last, masked)


def test_epochs_need_the_number_of_blocks():
    assert plan_training(training(epochs=2), 32, None) is None
    plan = plan_training(training(epochs=1.5), 32, 11)
    assert plan is not None
    assert (plan.sequences, plan.steps) == (16, 2)


@pytest.mark.parametrize(("ranks", "sequences"), [(1, 4), (2, 3), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_a_micro_batch_divides_a_ranks_share(ranks, sequences):
    assert training(steps=1, batch_sequences=12, micro_batch_sequences=4).micro_batch_on(ranks) == sequences


def test_the_warm_up_is_a_rounded_share_of_the_steps():
    for steps, warmup in ((149, 1), (160, 2), (1000, 10)):
        plan = plan_training(training(steps=steps), 32, None)
        assert plan is not None and plan.warmup_steps == warmup


def test_distillation_adds_the_teachers_forward():
    plan = plan_training(training(steps=3), 32, None)
    assert plan is not None
    small, large = (
        ModelShape(vocabulary_size=64, hidden_size=size, intermediate_size=16, num_layers=1, num_heads=1)
        for size in (8, 16)
    )
    extra = training_flops(plan, small, large) - training_flops(plan, small)
    assert extra == pytest.approx(large.forward_flops_per_token(32) * 3 * 8 * 32)


def test_a_batch_that_does_not_divide_names_the_counts_that_do():
    check_batch("s", training(steps=1), 8)
    with pytest.raises(RecipeError) as error:
        check_batch("s", training(steps=1), 3)
    assert "use 1, 2, 4, 8 ranks" in error.value.do


@pytest.mark.parametrize(
    ("changes", "steps", "count"),
    [
        ({}, 10_000, 3),
        ({"keep_checkpoints": 0}, 10_001, 21),
        ({"keep_checkpoints": 5}, 600, 2),
        ({"keep_checkpoints": 1}, None, 2),
        ({"keep_checkpoints": 2, "patience": 3, "evaluate_every_steps": 100}, 10_000, 4),
        ({"keep_checkpoints": 0, "patience": 3, "evaluate_every_steps": 300}, 3000, 6 + 10 - 2),
        ({"keep_checkpoints": 0, "patience": 3, "evaluate_every_steps": 300}, 3001, 6 + 10 - 2 + 1),
        ({"keep_checkpoints": 0, "patience": 3, "evaluate_every_steps": 700}, 1400, 2 + 2),
        ({"keep_checkpoints": 0, "evaluate_every_steps": 300}, 3000, 6),
        ({"keep_checkpoints": 5, "patience": 3, "evaluate_every_steps": 300}, 600, 3),
        ({"keep_every_steps": 1000}, 10_000, 3 + 10),
        ({"keep_every_steps": 300}, 10_000, 3 + 6),
        ({"keep_every_steps": 600, "patience": 3, "evaluate_every_steps": 300}, 6000, 3 + 1 + 2 + 10),
    ],
)
def test_checkpoints_on_disk(changes, steps, count):
    assert checkpoint_bytes(training(steps=4, checkpoint_every_steps=500, **changes), 10, steps) == count * 120
    assert checkpoint_bytes(training(epochs=1, keep_checkpoints=0), 10, None) is None


def test_checkpoints_on_disk_that_are_kept_all_along():
    assert checkpoint_bytes(training(epochs=1, keep_every_steps=1000), 10, None) is None
    assert checkpoint_bytes(training(steps=4, checkpoint_every_steps=500), 10, 10_000, named={500, 1000}) == 5 * 120


@pytest.mark.parametrize(("steps", "every", "evaluated"), [(12, 5, 3), (12, 4, 6), (13, 5, 3), (7, 10, 10), (30, 6, 4)])
def test_checkpoints_are_those_that_the_loop_writes(steps, every, evaluated):
    done = range(1, steps + 1)
    written = sum(step == steps or step % every == 0 or step % evaluated == 0 for step in done)
    stage = training(
        steps=steps, checkpoint_every_steps=every, evaluate_every_steps=evaluated, patience=1, keep_checkpoints=0
    )
    assert checkpoint_bytes(stage, 10, steps) == written * 120


def test_sizes_read_easily():
    sizes = [size_text(size) for size in (999, 1000, 126_000_000_000, 4 * 10**18)]
    assert sizes == ["999 bytes", "1 kB", "126 GB", "4e+03 PB"]


def test_the_papers_run(root: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = root / "recipes" / "minima-3b.yaml"
    recipe = load_recipe(path)
    text = dry_run_text(recipe, path, recipe.stages)
    student = text[text.index("student (distil)") :]
    assert "student    3,020,442,624 parameters" in student
    assert "steps      30,041 of 1,024 sequences" in student
    assert "758 whole sequences, filled with 266 fully masked ones" in student
    assert "left over  3,072 tokens" in student
    assert "models/llama2-7b (model) is not on this machine" in text
    corpus = text[text.index("# what would run") :]
    assert "disk       252 GB\n" in corpus, "126e9 tokens of two bytes, and what is held out"
    assert "disk       109 GB of checkpoints, at most" in student, "three of 12 bytes a parameter"
    memory = student[student.index("memory     per rank, ") : student.index("quality (evaluate)")]
    names = [line.split()[0] for line in memory.splitlines() if len(line.split()) > 8 and "GB" in line]
    assert {"replica", "zero3_node", "zero3_node+cpu"} <= set(names)
    assert "peak may be up to 90% of a device" in memory
    assert "disk       6.04 GB in bfloat16" in student[student.index("(export)") :]
    for key, value in {
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "gradient_clip": 1.0,
        "warmup_fraction": 0.01,
    }.items():
        assert getattr(recipe.stage("student"), key) == value
    assert recipe.stage("teacher").learning_rate == 3e-5


def test_every_shipped_recipe_dry_runs_without_torch(root: Path, tmp_path):
    code = (
        "import sys\nfrom minima.cli import main\n"
        "for name in sys.argv[1:]:\n    assert main(['run', name, '--dry-run']) == 0\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    paths = sorted((root / "recipes").glob("*.yaml"))
    recipes = [str(path) for path in paths if not path.stem.startswith("law-")]  # those are `minima law study`'s
    done = subprocess.run([sys.executable, "-c", code, *recipes], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("# what would run") == len(recipes) >= 2
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


RECIPE = """
name: x
ranks: 2
stages:
  - {name: c, kind: build_data, sources: [{path: "no/*.jsonl"}], tokenizer: t, sequence_length: 64, tokens: 1e4}
  - name: t
    kind: adapt
    model: {source: base}
    data: c
    batch_sequences: 8
    micro_batch_sequences: 4
    epochs: 1
    learning_rate: 1e-3
  - {name: p, kind: prune, model: t, data: c, target: {sparsity: 50}}
  - {name: e, kind: export, model: t}
"""
CONFIG = ModelShape(
    vocabulary_size=100, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_positions=64
).to_config()


@pytest.fixture
def show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def show(*overrides: str, text: str = RECIPE) -> str:
        path = tmp_path / "x.yaml"
        path.write_text(text.replace("tokenizer: t,", "tokenizer: tok,"), encoding="utf-8")
        recipe = load_recipe(path, overrides)
        return dry_run_text(recipe, path, recipe.stages)

    return show


def test_shapes_come_from_a_config_json(show, tmp_path):
    text = show()
    assert "the model's config.json is not on this machine" in text
    assert "no/*.jsonl (source no/*.jsonl) is not on this machine" in text
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    text = show()
    shape = ModelShape.from_config(CONFIG)
    assert text.count(f"{shape.parameters:,} parameters") == 3, "model of t, before pruning in p, and exported e"
    assert "156 blocks of 64; the last 16 do not fill a block" in text
    with pytest.raises(RecipeError, match=r"stages\.t: blocks of 128 tokens for a model of 64"):
        show("stages.c.sequence_length=128")
    with pytest.raises(ShapeError, match=r"stages\.p: .*num_heads 8"):
        show("stages.p.target={num_heads: 8}")


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [("{vocabulary_size: 65536}", "20"), ("{vocabulary_size: 65537}", "39.9"), ("base", "20"), ("unknown", "20")],
)
def test_data_on_disk_follows_from_the_vocabulary(show, tmp_path, tokenizer, size):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    data = RECIPE[: RECIPE.index("  - name: t")].replace("tokenizer: t,", f"tokenizer: {tokenizer},")
    assert f"disk       {size} kB\n" in show(text=data)


@pytest.mark.parametrize(
    ("content", "error"),
    [('{"model_type": "llama", ', CheckpointError), ("[]", CheckpointError), ('{"model_type": "llama"}', ShapeError)],
)
def test_a_broken_config_json_is_named(show, tmp_path, content, error):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(content)
    with pytest.raises(error, match=r"stages\.t: .*config\.json"):
        show()
    assert "every token once" in show("stages.c.tokens=null", text=RECIPE[: RECIPE.index("  - name: t")])


def test_data_of_another_kind_of_stage_is_left_to_its_reader(show, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"stage": {"name": "other", "kind": "prune"}}')
    assert "tokens and steps are unknown until the data is built" in show("stages.t.data=other")


def test_what_evaluates_needs_held_out_text(show):
    show("stages.c.held_out_fraction=0")
    with pytest.raises(RecipeError, match=r"stages\.t: .*evaluates while it trains.*held_out_fraction 0"):
        show("stages.c.held_out_fraction=0", "stages.t.evaluate_every_steps=5")
    text = RECIPE + "  - {name: q, kind: evaluate, models: [t], data: c}\n"
    show(text=text)
    with pytest.raises(RecipeError, match=r"stages\.q: .*evaluates.*held_out_fraction 0"):
        show("stages.c.held_out_fraction=0", text=text)


DISTIL = """
name: x
ranks: 1
stages:
  - {name: c, kind: build_data, sources: [{embedded: sotu}], tokenizer: tok, sequence_length: 64}
  - {name: d, kind: distil, model: {random: &s {vocabulary_size: 64, hidden_size: 8, intermediate_size: 8,
     num_layers: 1, num_heads: 1}}, teacher: {source: b, shape: {<<: *s, num_layers: 5}}, data: c, batch_sequences: 8,
     micro_batch_sequences: 4, steps: 3, learning_rate: 1e-3}
"""


def test_a_teacher_that_does_not_run_costs_nothing(show):
    small = ModelShape(vocabulary_size=64, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    plan = plan_training(training(steps=3), 64, None)
    assert plan is not None
    alone = flops_text(training_flops(plan, small))
    assert alone not in show(text=DISTIL)
    assert alone in show("stages.d.soft_weight=0", text=DISTIL)


def test_vocabularies_that_differ_are_refused(show):
    text = RECIPE + (
        "  - {name: d, kind: distil, model: {random: {vocabulary_size: 64, hidden_size: 8, intermediate_size: 8,"
        " num_layers: 1, num_heads: 1}}, teacher: {source: b, shape: {vocabulary_size: 48, hidden_size: 8,"
        " intermediate_size: 8, num_layers: 1, num_heads: 1}}, data: c, batch_sequences: 8,"
        " micro_batch_sequences: 4, steps: 1, learning_rate: 1e-3}\n"
    )
    with pytest.raises(VocabularyMismatch, match="64 and a teacher with 48"):
        show(text=text)


def test_a_batch_that_ranks_cannot_share_is_refused(show):
    with pytest.raises(RecipeError, match=r"stages\.t: batch_sequences 8 is not divisible by 3"):
        show("ranks=3")


def test_a_dry_run_says_which_deepspeed_json_it_cannot_read(tmp_path, root: Path):
    text = (root / "recipes" / "quickstart.yaml").read_text()
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "many"}}')
    assert "kind: distil\n" in text
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("kind: distil\n", "kind: distil\n    deepspeed: own.json\n", 1))
    recipe = load_recipe(path)
    shown = dry_run_text(recipe, path, recipe.stages)
    count = sum(stage.kind == "distil" for stage in recipe.stages)  # the others take over what the first one says
    assert shown.count("own.json cannot be read as a DeepSpeed JSON") == count
    assert "memory     per rank, " not in shown
