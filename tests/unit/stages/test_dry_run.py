"""The dry run of stages that read what earlier ones left, here or in another run's folder."""

import json

import pytest
import yaml

from minima.data.store import FORMAT, TokenStore
from minima.errors import (
    DataError,
    MinimaError,
    RecipeError,
    ShapeError,
    StageError,
    TokenizerMismatch,
    UnsupportedFamily,
    VocabularyMismatch,
)
from minima.models.layout import MARKER, step_folder
from minima.models.shape import ModelShape
from minima.planning.arithmetic import plan_training, training_flops
from minima.planning.dry_run import render
from minima.planning.units import flops_text, size_text
from minima.recipe.loading import load_recipe
from minima.recipe.schema import Align, BuildData, Recipe
from minima.stages.origin import check_fit
from minima.stages.preview.dry_run import dry_run_text, walk

SMALL = {"vocabulary_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}
LENGTH = 256


def data_stage(format="text", **changes) -> dict:
    embedded = {"text": "sotu", "conversations": "chat", "preferences": "preferences"}[format]
    return {
        "name": "c",
        "kind": "build_data",
        "format": format,
        "sources": [{"embedded": embedded}],
        "tokenizer": "tok",
        "sequence_length": LENGTH,
        **changes,
    }


def training(kind, **changes) -> dict:
    length = {} if {"steps", "tokens"} & set(changes) else {"epochs": 3}
    given = {"name": "t", "kind": kind, "model": {"random": SMALL}, "data": "c", "learning_rate": 1e-3}
    return given | {"batch_sequences": 4, "micro_batch_sequences": 2} | length | changes


@pytest.fixture
def show(tmp_path, monkeypatch):
    """Gives the dry run's facts and notes of the last stage; the run's folder is `out`."""
    monkeypatch.chdir(tmp_path)

    def show(*stages: dict) -> tuple[dict[str, str], list[str]]:
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump({"name": "x", "output": "out", "ranks": 1, "stages": list(stages)}))
        last = walk(load_recipe(path), path)[-1]
        return dict(last.facts), [*last.missing, *last.refused, *last.notes]

    return show


@pytest.fixture
def built(tmp_path):
    """Leaves a finished build_data stage without tokens, as far as a dry run looks at one."""

    def built(where: str, blocks: int, longest: int | None = None, **changes) -> dict:
        stage, folder = data_stage(**changes), tmp_path / where
        (folder / "train").mkdir(parents=True)
        resolved = BuildData.model_validate(stage).model_dump(mode="json")
        (folder / "manifest.json").write_text(json.dumps({"stage": resolved, "metrics": {"blocks": blocks}}))
        chat = stage["format"] != "text"
        index = {"format": FORMAT, "sequence_length": LENGTH, "vocabulary_size": 64, "end_token": 0, "tokens": 0}
        index |= {"documents": 0, "bytes": 0, "dtype": "<u2", "shards": [], "document_mask": True}
        index |= {"format_of_documents": stage["format"]} | ({"longest": longest or LENGTH} if chat else {})
        (folder / "train" / "index.json").write_text(json.dumps(index))
        return stage

    return built


@pytest.fixture
def left(tmp_path):
    """Leaves a finished stage with a model in `model/`, or in a checkpoint."""

    def left(where: str, shape: ModelShape, step: int | None = None) -> None:
        own = tmp_path / where
        folder = own / "model" if step is None else step_folder(own / "checkpoints", step)
        folder.mkdir(parents=True)
        config = shape.to_config()
        content = config if step is None else {"config": config, "step": step}
        (folder / ("config.json" if step is None else MARKER)).write_text(json.dumps(content))
        (own / "manifest.json").write_text("{}")

    return left


def flops(stage: dict, blocks: int, reference_blocks: int | None = None) -> float:
    plan = plan_training(Align.model_validate(stage), LENGTH, blocks)
    assert plan is not None
    return training_flops(plan, ModelShape(**SMALL), ModelShape(**SMALL), reference_blocks)


def test_a_precomputed_reference_runs_once_over_the_blocks(show, built):
    data, stage = built("out/c", 7, format="preferences"), training("align")
    each = show(data, stage)[0]["FLOPs"]
    assert each == flops_text(flops(stage, 7))
    once = show(data, stage | {"precompute_reference": True})[0]["FLOPs"]
    assert once == flops_text(flops(stage, 7) * 10 / 12), "three epochs of three passes each, and one pass"


def test_a_precomputed_reference_of_data_that_is_not_built_is_named(show):
    stage = training("align", steps=5, precompute_reference=True)
    shown = show(data_stage("preferences"), stage)[0]["FLOPs"]
    assert shown == flops_text(flops(stage, 0, 0)) + "; plus one pass of the reference over the data, once it is built"
    budget = show(data_stage("preferences", tokens=9 * LENGTH), stage)[0]["FLOPs"]
    assert budget == flops_text(flops(stage, 9, 9))


@pytest.mark.parametrize(("format", "size"), [("text", "2.05 kB"), ("conversations", "3.07 kB")])
def test_a_learnt_byte_for_each_token_of_chat_is_counted(show, format, size):
    assert show(data_stage(format, tokens=4 * LENGTH))[0]["disk"] == size


@pytest.mark.parametrize(("kind", "format"), [("instruct", "conversations"), ("align", "preferences")])
@pytest.mark.parametrize("longest", [128, 129])
def test_conversations_fit_where_the_stage_says_that_they_fit(show, built, tmp_path, kind, format, longest):
    stage = training(kind, model={"random": SMALL | {"max_positions": 128}})
    assert "tokens and steps are unknown until the data is built" in show(data_stage(format), stage)[1]
    data = built("out/c", 7, longest=longest, format=format)
    store = TokenStore.open(tmp_path / "out/c/train")
    shape = ModelShape(**SMALL, max_positions=128)
    if longest == 128:
        check_fit(shape, store, "m")
        assert "FLOPs" in show(data, stage)[0]
        return
    with pytest.raises(ShapeError):
        check_fit(shape, store, "m")
    with pytest.raises(RecipeError, match=r"stages\.t: documents of 129 tokens for a model of 128 positions"):
        show(data, stage)


def test_text_longer_than_the_positions_is_refused_before_it_is_built(show):
    with pytest.raises(RecipeError, match=r"stages\.t: blocks of 256 tokens for a model of 128 positions"):
        show(data_stage(), training("adapt", model={"random": SMALL | {"max_positions": 128}}))


@pytest.mark.parametrize("rows", [96, 48])
def test_a_teacher_that_does_not_run_may_have_any_vocabulary(show, rows):
    """Of random weights every row is a token's."""
    teacher, own = ({"random": SMALL | {"vocabulary_size": size}} for size in (rows, 64))
    stage = training("distil", steps=3, model=own, teacher=teacher)
    with pytest.raises(VocabularyMismatch, match=f"student with vocabulary 64 and a teacher with {rows}; "):
        show(data_stage(), stage)
    facts, _ = show(data_stage(), stage | {"soft_weight": 0})
    assert "teacher" not in facts


def test_a_teacher_that_does_not_run_costs_nothing(show):
    facts, _ = show(data_stage(), training("distil", steps=3, teacher={"source": "b", "shape": SMALL}, soft_weight=0))
    assert facts["FLOPs"] == flops_text(flops(training("align", steps=3), 0, 0))


@pytest.mark.parametrize(("longer", "rows"), [("teacher", (64, 96)), ("student", (96, 64))])
def test_padding_of_one_vocabulary_is_left_out_and_said(show, longer, rows):
    student, teacher = ({"source": "b", "shape": SMALL | {"vocabulary_size": size}} for size in rows)
    stage = training("distil", steps=3, model=student, teacher=teacher)
    facts, notes = show(data_stage(), stage)
    assert f"the {longer}'s last 32 vocabulary rows will be ignored, which is right only for padding" in notes
    same = training("distil", steps=3, model=teacher | {"shape": SMALL}, teacher=teacher | {"shape": SMALL})
    assert facts["FLOPs"] == show(data_stage(), same)[0]["FLOPs"]


def test_so_many_rows_are_told_to_be_no_padding(show):
    rows = {"student": 1024, "teacher": 3000}
    models = {who: {"source": f"o/{who}", "shape": SMALL | {"vocabulary_size": size}} for who, size in rows.items()}
    stage = training("distil", steps=1, model=models["student"], teacher=models["teacher"])
    assert any(
        "last 1,976 vocabulary rows" in note and "1,976 is unusually many" in note
        for note in show(data_stage(), stage)[1]
    )


def test_a_shape_that_a_config_on_this_machine_contradicts_is_refused(show, left):
    left("model", ModelShape(**SMALL, num_key_value_heads=1))
    stage = training("adapt", steps=1, model={"source": "model", "shape": SMALL})
    assert "FLOPs" in show(data_stage(), stage)[0]
    for wrong in ({"hidden_size": 16}, {"num_heads": 2, "num_key_value_heads": 1}):
        with pytest.raises(ShapeError, match="the recipe says"):
            show(data_stage(), stage | {"model": {"source": "model", "shape": SMALL | wrong}})
    tied = stage | {"model": {"source": "model", "shape": SMALL | {"tied": True}}}
    assert show(data_stage(), tied) == show(data_stage(), stage), "what is here is what counts"


@pytest.mark.parametrize(("rows", "size"), [(1 << 16, "2.05 kB"), ((1 << 16) + 1, "4.1 kB")])
def test_the_shape_of_a_model_tells_the_bytes_of_its_tokens(show, rows, size):
    model = {"source": "o/m", "shape": SMALL | {"vocabulary_size": rows}}
    data = data_stage(tokens=4 * LENGTH, tokenizer="o/m") | {"name": "last"}
    assert show(training("adapt", steps=1, model=model, data="o/x"), data)[0]["disk"] == size


@pytest.mark.parametrize("zero", [{"stage": 2}, {"stage": 3, "zero_hpz_partition_size": 2}])
def test_a_deepspeed_json_that_a_run_would_refuse_is_told(show, tmp_path, zero):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    notes = show(data_stage(), training("adapt", steps=1, deepspeed="own.json"))[1]
    assert any("own.json" in note and ("stage to 3" in note or "hpz" in note) for note in notes)


def test_a_hub_model_that_a_benchmark_measures_is_looked_for_in_the_cache(show, monkeypatch, tmp_path):
    monkeypatch.setattr("minima.stages.preview.known_inputs.cached_config", lambda *_: tmp_path / "config.json")
    answers = [{"format": "mt_bench", "questions": "q.jsonl"}]
    _, missing = show({"name": "b", "kind": "benchmark", "model": "org/model", "answers": answers})
    assert missing == ["q.jsonl is not on this machine"]


def test_pieces_that_the_recipe_adds_are_no_padding(show):
    base = {"source": "b", "shape": SMALL}
    grown = {"name": "g", "kind": "expand_vocabulary", "model": base, "tokenizer": "b", "donor": "d", "size": 128}
    taught = training("adapt", name="taught", model="g", steps=3)
    stage = training("distil", steps=3, model=base, teacher="taught")
    with pytest.raises(VocabularyMismatch, match="a teacher with 128; the teacher's has 128 tokens"):
        show(data_stage(), grown, taught, stage)
    show(data_stage(), grown, taught, stage | {"model": "g"})


@pytest.mark.parametrize("ids", [64, 65])
def test_a_tokenizer_that_is_here_is_asked(show, tmp_path, ids):
    (tmp_path / "big").mkdir()
    words = {str(number): number for number in range(60)}
    added = [{"id": ids - 1, "content": "<last>"}]
    content = json.dumps({"model": {"vocab": words}, "added_tokens": added})
    (tmp_path / "big" / "tokenizer.json").write_text(content)
    shape = ModelShape(**SMALL | {"vocabulary_size": 96})
    (tmp_path / "big" / "config.json").write_text(json.dumps(shape.to_config()))
    stage = training("distil", steps=3, teacher="big")
    if ids == 64:
        assert "32 vocabulary rows will be ignored" in " ".join(show(data_stage(), stage)[1])
        return
    with pytest.raises(VocabularyMismatch, match="a teacher with 96; the teacher's has 65 tokens"):
        show(data_stage(), stage)


def test_a_reference_may_have_more_rows_and_not_fewer_than_the_data_has_ids(show):
    text, data = data_stage(name="b", tokenizer={"vocabulary_size": 300}), data_stage("preferences", tokenizer="b")
    stage = training("align", steps=3, model={"random": SMALL | {"vocabulary_size": 300}})
    show(text, data, stage | {"reference": {"source": "r", "shape": SMALL | {"vocabulary_size": 400}}})
    with pytest.raises(TokenizerMismatch, match="has 300 ids, but the reference has 299"):
        show(text, data, stage | {"reference": {"source": "r", "shape": SMALL | {"vocabulary_size": 299}}})


def test_data_of_another_run_is_not_taken_for_a_stage_of_its_name(show, built):
    own = built("out/c", 7)
    built("runs/other/c", 100)
    assert show(own, training("adapt"))[0]["tokens"].startswith("5,376 in 21 ")
    assert show(own, training("adapt", data="runs/other/c"))[0]["tokens"].startswith("76,800 in 300 ")
    assert show(training("adapt", data="runs/other/c"))[0]["tokens"].startswith("76,800 in 300 ")


GROWN = ModelShape(**SMALL | {"vocabulary_size": 128})
EXPAND = {"name": "g", "kind": "expand_vocabulary", "model": "base", "tokenizer": "tok", "donor": "donor"}


def test_a_finished_stage_tells_the_grown_vocabulary(show, left):
    later = training("adapt", model="g", steps=3)
    assert "the extended vocabulary's size is unknown until the stage has run" in show(EXPAND)[1]
    assert any("config.json is not on this machine" in note for note in show(data_stage(), EXPAND, later)[1])
    left("out/g", GROWN)
    facts, notes = show(EXPAND)
    assert "vocabulary 128" in facts["to"]
    assert not any("unknown until" in note for note in notes)
    facts, _ = show(data_stage(), EXPAND, later)
    assert "vocabulary 128" in facts["model"]
    assert "FLOPs" in facts


@pytest.mark.parametrize("step", [None, 12])
def test_a_stages_folder_tells_its_models_shape(show, left, step):
    left("runs/other/g", GROWN, step)
    assert "vocabulary 128" in show(data_stage(), training("adapt", model="runs/other/g"))[0]["model"]


def test_a_finished_training_stage_tells_a_shape_that_nothing_else_does(show, left, tmp_path):
    stage = training("adapt", model="gone", steps=3)
    left("out/t", GROWN, 3)
    export = {"name": "e", "kind": "export", "model": "t"}
    assert "vocabulary 128" in show(data_stage(), stage, export)[0]["model"]
    (tmp_path / "out/t/manifest.json").unlink()
    assert "model" not in show(data_stage(), stage, export)[0], "half-finished: whose it is is not sure"


def test_a_finished_prune_stage_tells_what_stayed(show, left):
    prune = {"name": "p", "kind": "prune", "model": "gone", "score": "magnitude", "target": {"sparsity": 50}}
    assert "to" not in show(prune)[0]
    left("out/p", GROWN)
    assert "vocabulary 128" in show(prune)[0]["to"]


GPT2 = SMALL | {"family": "gpt2", "vocabulary_size": 64, "hidden_size": 16, "num_heads": 4, "num_layers": 4}
PRUNE = {"name": "small", "kind": "prune", "model": "base", "data": "c", "target": {"num_layers": 2}}


def test_what_surgery_would_refuse_is_refused_before_the_model_is_trained(show):
    base = training("adapt", name="base", model={"random": GPT2})
    show(data_stage(), base, PRUNE)
    with pytest.raises(ShapeError, match="norm_compensation 'rms' for a gpt2 model"):
        show(data_stage(), base, PRUNE | {"norm_compensation": "rms"})


def test_padding_to_the_widest_layer_is_a_bound(show):
    base = training("adapt", name="base", model={"random": GPT2 | {"family": "llama", "num_heads": 4}})
    prune = PRUNE | {"target": {"intermediate_size": 4}}
    assert "at most" not in show(data_stage(), base, prune)[0]["share"]
    assert show(data_stage(), base, prune | {"selection": "global"})[0]["share"].startswith("at most ")


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}'])
def test_a_broken_marker_is_left_to_its_reader(show, left, tmp_path, content):
    left("runs/other/g", GROWN, 3)
    (tmp_path / "runs/other/g/checkpoints/step-00000003/checkpoint.json").write_text(content)
    notes = show(data_stage(), training("adapt", model="runs/other/g"))[1]
    assert any("config.json is not on this machine" in note for note in notes)


def test_a_broken_store_is_left_to_its_reader(show, built, tmp_path):
    data = built("out/c", 7, longest=300, format="conversations")
    stage = training("instruct", model={"random": SMALL | {"max_positions": 128}})
    with pytest.raises(MinimaError):
        show(data, stage)
    (tmp_path / "out/c/train/index.json").write_text("{")
    assert "FLOPs" in show(data, stage)[0]


@pytest.mark.parametrize(
    ("field", "text", "meant"), [("model", "bas", "base"), ("data", "corp", "corpus"), ("model", "base@last", "base")]
)
def test_a_misspelt_stage_is_not_taken_for_a_hub_id(show, field, text, meant):
    base = training("adapt", name="base", data="corpus", steps=2)
    later = training("adapt", model="base", data="corpus", steps=2) | {field: text}
    with pytest.raises(RecipeError, match=f"stages.t.{field}: '{text}' is neither a stage .* did you mean '{meant}'"):
        show(data_stage(name="corpus"), base, later)
    _, notes = show(data_stage(name="corpus"), base, training("adapt", model="owner/bas", data="corpus", steps=2))
    assert notes[0].startswith("owner/bas (model) is not on this machine")


@pytest.mark.parametrize(
    ("name", "text"), [("distil", "distilgpt2"), ("gpt2-small", "gpt2-xl"), ("gpt2-pruned", "gpt2-medium")]
)
def test_a_hub_id_without_an_owner_is_no_misspelt_stage(show, name, text):
    first = training("adapt", name=name, data="corpus", steps=2)
    _, notes = show(data_stage(name="corpus"), first, training("adapt", model=text, data="corpus", steps=2))
    assert notes[0].startswith(f"{text} (model) is not on this machine")


def test_data_of_another_run_names_that_runs_stages(show, built):
    """Its tokenizer is a stage of the other recipe, whatever a stage of that name is in this one."""
    built("other", blocks=4, tokenizer="c", document_mask=False)
    model = {"random": SMALL | {"vocabulary_size": 300}}
    own = data_stage(tokenizer={"vocabulary_size": 500})
    for c in (own, data_stage(tokenizer="other")):  # the second would be looked for round and round
        facts, _ = show(c, training("adapt", steps=2, model=model, data="other"))
        assert "model" in facts and "steps" in facts


def test_a_step_that_a_stage_never_reaches(show):
    stages = [data_stage(tokens=LENGTH * 40), training("adapt", name="base", tokens=LENGTH * 40)]
    show(*stages, training("adapt", model="base@10", steps=2))
    with pytest.raises(RecipeError, match="'base@11', but that stage ends with step 10"):
        show(*stages, training("adapt", model="base@11", steps=2))


SAVED = {"name": "base", "steps": 10, "checkpoint_every_steps": 4}


@pytest.mark.parametrize(
    ("step", "changes", "but"),
    [
        (4, {}, None),
        (8, {}, None),
        (10, {}, None),
        (6, {}, "saves every 4 steps and at its end"),
        (0, {}, "saves every 4 steps and at its end"),
        (6, {"evaluate_every_steps": 3}, "saves every 4 steps and at its end"),
        (6, {"evaluate_every_steps": 3, "patience": 1}, None),
        (5, {"evaluate_every_steps": 3, "patience": 1}, "saves every 4 and every 3 steps and at its end"),
    ],
)
def test_a_step_that_a_stage_never_saves(show, step, changes, but):
    stages = [data_stage(), training("adapt", **SAVED | changes), training("adapt", model=f"base@{step}", steps=2)]
    if but is not None:
        with pytest.raises(RecipeError, match=rf"^stages\.t\.model: 'base@{step}', but that stage {but}"):
            show(*stages)
        return
    _, notes = show(*stages)
    note = f"base@{step} will exist only if base's best step is not earlier"
    assert (note in notes) == ("patience" in changes)


def test_a_step_that_lies_there_may_be_read_whenever_it_was_saved(show, left):
    left("out/base", ModelShape(**SMALL), step=6)
    facts, _ = show(data_stage(), training("adapt", **SAVED), training("adapt", model="base@6", steps=2))
    assert facts["steps"].startswith("2 ")


def test_a_checkpoint_that_is_named_takes_its_disk(tmp_path):
    sizes = []
    for text in ("base", "base@4"):
        stages = [data_stage(), training("adapt", **SAVED | {"steps": 80}), training("adapt", model=text, steps=2)]
        recipe = Recipe(name="x", output=str(tmp_path / "out"), ranks=1, stages=stages)
        sizes.append(dict(walk(recipe, tmp_path / "x.yaml")[1].facts)["disk"])
    parameters = ModelShape(**SMALL).parameters
    assert sizes == [f"{size_text(count * 12 * parameters)} of checkpoints, at most" for count in (3, 4)]


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ({"tokens": LENGTH}, None),
        ({"tokens": LENGTH - 1}, "tokens 255 is less than one sequence of 256 tokens"),
        ({"tokens": None, "epochs": 0.1}, None),
        ({"tokens": None, "epochs": 0.05}, "epochs 0.05 is less than one sequence of 256 tokens"),
    ],
)
def test_a_length_of_no_sequence(show, length, said):
    stages = [data_stage(tokens=8 * LENGTH), training("adapt", **length)]
    if said is None:
        assert show(*stages)[0]["steps"].startswith("1 of ")
        return
    with pytest.raises(RecipeError, match=rf"^stages\.t: {said}"):
        show(*stages)


@pytest.mark.parametrize("name", ["tokens", "held_out_tokens"])
def test_data_of_no_block(show, name):
    show(data_stage(**{name: LENGTH}))
    show(data_stage(held_out_fraction=0, held_out_tokens=1))
    with pytest.raises(RecipeError, match=f"{name}: 255, less than one block of 256 tokens"):
        show(data_stage(**{name: LENGTH - 1}))


def test_an_output_that_a_run_would_refuse(tmp_path):
    recipe = Recipe(name="x", output=str(tmp_path / "x.yaml" / "deep" / "y"), ranks=1, stages=[data_stage()])
    dry_run_text(recipe, tmp_path / "x.yaml", recipe.stages)
    (tmp_path / "x.yaml").touch()
    with pytest.raises(StageError, match=r"deep/y cannot be used \(.*Not a directory: '.*/x\.yaml'\)"):
        dry_run_text(recipe, tmp_path / "x.yaml", recipe.stages)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("{name: other, stages: [{name: c}]}")
    with pytest.raises(StageError, match="output folder of another recipe"):
        dry_run_text(recipe.model_copy(update={"output": str(tmp_path / "out")}), tmp_path / "x.yaml", recipe.stages)


def test_a_trained_tokenizer_larger_than_the_model(show):
    model = {"random": SMALL | {"vocabulary_size": 300}}
    show(data_stage(tokenizer={"vocabulary_size": 300}), training("adapt", steps=2, model=model))
    with pytest.raises(TokenizerMismatch, match="has 301 ids, but the model has 300 embedding rows"):
        show(data_stage(tokenizer={"vocabulary_size": 301}), training("adapt", steps=2, model=model))


def test_a_finished_stage_that_run_would_refuse_is_told(show, built):
    data = built("out/c", 7)
    why = "held_out_fraction is 0.25 and was 0.005; remove out/c to make it again"
    assert why not in show(data)[1]
    assert why in show(data | {"held_out_fraction": 0.25})[1]


def test_the_last_lines_say_what_stands_in_the_way(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = built("out/c", 7)
    raw = {"name": "x", "output": "out", "ranks": 1}

    def last_lines(*stages):
        recipe = Recipe.model_validate(raw | {"stages": stages})
        return render("", walk(recipe, tmp_path / "x.yaml")).partition("# in short\n")[2].splitlines()

    assert last_lines(data) == ["stages: 1 finished"]
    later = {"name": "later", "kind": "evaluate", "models": ["here", "gone"], "data": "c"}
    (tmp_path / "here").mkdir()
    assert last_lines(data | {"held_out_fraction": 0.25}, later) == [
        "stages: 1 finished, 1 not begun",
        "the run would be refused",
        "  c: held_out_fraction is 0.25 and was 0.005; remove out/c to make it again",
        "missing here",
        "  later: gone (models.1) is not on this machine",
    ]


def test_a_manifest_that_cannot_be_read_stops_no_other_stage(show, built, tmp_path):
    data = built("out/c", 7)
    (tmp_path / "out" / "later").mkdir()
    (tmp_path / "out" / "later" / "started.json").write_text("{")
    (tmp_path / "out" / "later" / "metrics.jsonl").touch()
    later = {"name": "later", "kind": "evaluate", "models": [str(tmp_path)], "data": "c"}
    assert not any("remove" in note for note in show(data, later)[1])


def tokenizer_folder(path, *pieces):
    path.mkdir(parents=True)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    added = [{"id": 0, "content": pieces[0]}]
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
    shape = ModelShape.model_validate(SMALL | {"vocabulary_size": 300})
    (path / "config.json").write_text(json.dumps(shape.to_config()))


def test_a_tokenizer_that_is_trained_for_a_model_with_its_own_is_refused(show, tmp_path):
    """Before anything is built: a corpus of a large run takes days."""
    tokenizer_folder(tmp_path / "own", "</s>", "a", "b")
    trained = data_stage(tokenizer={"vocabulary_size": 300})
    size = r"'c' trains a tokenizer of 300 ids for its data, but own has its own, of 3"
    with pytest.raises(TokenizerMismatch, match=f"stages.t: {size}"):
        show(trained, training("adapt", steps=2, model="own"))
    prune = {"name": "p", "kind": "prune", "model": "own", "data": "c", "target": {"hidden_size": 4}}
    with pytest.raises(TokenizerMismatch, match=r"stages.p: 'c' trains a tokenizer of"):
        show(trained, prune)
    (tmp_path / "own" / "tokenizer.json").unlink()
    show(trained, training("adapt", steps=2, model="own"))  # weights alone have no tokens of their own


def test_a_model_of_another_run_that_trained_the_same_tokenizer_may_be_read(show, tmp_path, built):
    """The same texts give the same tokens: two runs may be compared."""
    tokenizer_folder(tmp_path / "other" / "tokenizer", *(f"p{number}" for number in range(300)))
    trained = data_stage(tokenizer={"vocabulary_size": 300}, held_out_fraction=0.5)
    compare = {"name": "q", "kind": "evaluate", "models": ["other"], "data": "c"}
    show(trained, compare)
    tokenizer_folder(tmp_path / "out" / "c" / "tokenizer", *(f"p{number}" for number in range(300)))
    show(trained, compare)
    tokenizer_folder(tmp_path / "out" / "c" / "other", *(f"q{number}" for number in range(300)))
    (tmp_path / "out/c/other/tokenizer.json").rename(tmp_path / "out/c/tokenizer/tokenizer.json")
    with pytest.raises(TokenizerMismatch, match="id 0 is 'q0'"):
        show(trained, compare)


def test_data_that_was_built_without_held_out_text_is_told_before_anything_is_trained(show, built, tmp_path):
    data = built("out/c", 7)
    manifest = tmp_path / "out" / "c" / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"metrics": (facts.get("metrics") or {}) | {"held_out_blocks": 0}}))
    compare = {"name": "q", "kind": "evaluate", "models": [str(tmp_path)], "data": "c"}
    with pytest.raises(RecipeError, match="the data 'c' has no held-out block"):
        show(data, compare)


@pytest.mark.parametrize("read", ["teacher", "model"])
def test_an_id_that_stands_for_something_else_is_refused(show, tmp_path, read):
    for name, last in {"one": "b", "same": "b", "other": "c"}.items():
        tokenizer_folder(tmp_path / name, "</s>", "a", last)
    models = {"model": "one", "teacher": "one"}
    show(data_stage(tokenizer="same"), training("distil", steps=2, **models))
    with pytest.raises(TokenizerMismatch, match="id 2 is 'b' in the data's tokenizer same, but 'c' in that of other"):
        show(data_stage(tokenizer="same"), training("distil", steps=2, **(models | {read: "other"})))


def test_a_model_that_comes_from_its_data_goes_with_it(show, tmp_path):
    tokenizer_folder(tmp_path / "own", "</s>", "a", "b")
    trained = data_stage(tokenizer={"vocabulary_size": 300})
    first = training("adapt", steps=2, name="base", model={"random": SMALL | {"vocabulary_size": 300}})
    again = data_stage(name="d", tokenizer="base")
    assert "model" in show(trained, first, again, training("adapt", steps=2, model="base", data="d"))[0]
    donor = {"vocabulary_size": 4000, "sources": [{"embedded": "poems"}]}
    grown = {
        "name": "g",
        "kind": "expand_vocabulary",
        "model": "own",
        "donor": donor,
        "size": 64,
        "count_on": [{"embedded": "poems"}],
    }
    assert "model" in show(grown, data_stage(tokenizer="g"), training("adapt", steps=2, model="g"))[0]


def test_a_task_that_no_file_tells_of_is_told_beforehand(show, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("task: mine\n")
    pytest.importorskip("lm_eval")
    (tmp_path / "own" / "folder.yaml").mkdir()
    (tmp_path / "own" / ".#mine.yaml").symlink_to("nowhere")  # an editor's
    benchmark = {"name": "b", "kind": "benchmark", "model": "org/model", "task_folder": "own"}
    right = ["mine", "mmlu_clinical_knowledge", "piqa", "mmlu", "stand_in_bbh", "mmlu_*", "own/mine.yaml"]
    assert not any("task file" in note for note in show(benchmark | {"tasks": right})[1])
    notes = show(benchmark | {"tasks": [*right, "hellaswg"]})[1]
    assert "no task file on this machine defines 'hellaswg'; did you mean 'hellaswag'?" in notes


def test_a_chat_template_that_is_not_there_is_told_beforehand(show, tmp_path):
    assert (
        "the chat_template mine.jinja is not on this machine"
        in show(data_stage("conversations", chat_template="mine.jinja"))[1]
    )
    (tmp_path / "mine.jinja").touch()
    for there in ("mine.jinja", "own", "minichat"):
        assert not any("chat_template" in note for note in show(data_stage("conversations", chat_template=there))[1])


WIDE = {"random": SMALL | {"max_positions": LENGTH}}
EVALUATE = {"name": "t", "kind": "evaluate", "models": ["b"], "data": "c"}


@pytest.mark.parametrize(
    ("format", "stage", "reads"),
    [
        ("text", training("instruct", model=WIDE), "conversations"),
        ("preferences", training("instruct", model=WIDE), "conversations"),
        ("conversations", training("align", model=WIDE), "preferences"),
        ("preferences", training("adapt", model=WIDE), "text or conversations"),
        ("preferences", training("distil", model=WIDE, teacher=WIDE), "text or conversations"),
        ("preferences", EVALUATE, "text or conversations"),
        (
            "preferences",
            {"name": "t", "kind": "prune", "model": WIDE, "data": "c", "target": {"num_layers": 1}},
            "text",
        ),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_data_of_a_kind_that_the_stage_does_not_read(show, built, tmp_path, format, stage, reads, elsewhere):
    data = data_stage(format) if not elsewhere else built("other/c", 7, format=format)
    before = [data, training("adapt", name="b", model=WIDE, data="d"), data_stage(name="d")]
    stage = stage | ({"data": str(tmp_path / "other/c")} if elsewhere else {})
    with pytest.raises(DataError, match=rf"stages\.t\.data: '.*c' contains {format}, but .* reads {reads}"):
        show(before[2], *before[:2], stage)


def test_only_a_pass_over_data_needs_data_of_its_kind(show):
    prune = {"name": "t", "kind": "prune", "model": WIDE, "data": "c", "target": {"num_layers": 1}}
    assert "share" in show(data_stage("preferences"), prune | {"score": "magnitude"})[0]


@pytest.mark.parametrize("who", ["teacher", "evaluated", "evaluation's teacher", "pruned"])
def test_text_longer_than_the_positions_of_any_model_that_reads_it(show, who):
    short = {"random": SMALL | {"max_positions": 128}}
    prune = {"name": "b", "kind": "prune", "model": short, "target": {"num_layers": 1}, "score": "magnitude"}
    stages = {
        "teacher": [training("distil", steps=1, model=WIDE, teacher=short)],
        "evaluated": [prune, EVALUATE],
        "evaluation's teacher": [prune | {"model": WIDE}, prune | {"name": "a"}, EVALUATE | {"teacher": "a"}],
        "pruned": [prune | {"name": "t", "score": "gradient", "data": "c"}],
    }[who]
    with pytest.raises(RecipeError, match=r"stages\.t: blocks of 256 tokens for a model of 128 positions"):
        show(data_stage(), *stages)
    if who == "pruned":
        show(data_stage(), stages[0] | {"sequence_length": 128})
        with pytest.raises(ShapeError, match="sequence_length 257 from blocks of 256 tokens"):
            show(data_stage(), stages[0] | {"model": WIDE, "sequence_length": 257})


@pytest.mark.parametrize("longest", [256, 257])
def test_what_an_evaluation_reads_is_as_long_as_its_held_out_documents(show, built, tmp_path, longest):
    data, part = built("out/c", 7, longest=300, format="conversations"), tmp_path / "out/c/held_out"
    index = json.loads((tmp_path / "out/c/train/index.json").read_text()) | {"longest": longest}
    part.mkdir()
    (part / "index.json").write_text(json.dumps(index))
    model = {"name": "b", "kind": "prune", "model": WIDE, "target": {"num_layers": 1}, "score": "magnitude"}
    if longest == 256:
        show(data, model, EVALUATE)
        return
    with pytest.raises(RecipeError, match=r"stages\.t: documents of 257 tokens for a model of 256 positions"):
        show(data, model, EVALUATE)


def test_a_teacher_that_no_machine_can_split(show):
    def split(family="llama", **keys):
        shape = SMALL | {"family": family, "hidden_size": 16, "num_heads": 4, "num_key_value_heads": keys.pop("kv", 4)}
        teacher = {"random": shape, "placement": "tensor_parallel", **keys}
        show(data_stage(), training("distil", steps=1, model={"random": SMALL}, teacher=teacher))

    split(tensor_parallel_ranks=4)
    split(kv=1)  # how many ranks share a machine is not known
    with pytest.raises(ShapeError, match=r"stages\.t\.teacher: .* AutoTP cannot split a gpt2"):
        split("gpt2")
    with pytest.raises(ShapeError, match="2 key-value heads are not divisible by 4 ranks"):
        split(kv=2, tensor_parallel_ranks=4)
    with pytest.raises(ShapeError, match="a single rank has no other to share it with"):
        split(tensor_parallel_ranks=1)


@pytest.mark.parametrize(("student", "teacher"), [("gpt2", "llama"), ("llama", "gpt_neox")])
def test_fused_kernels_of_a_family_that_has_none(show, student, teacher):
    models = {who: {"random": SMALL | {"family": name}} for who, name in (("model", student), ("teacher", teacher))}
    show(data_stage(), training("distil", steps=1, **models))
    family = "gpt2" if student == "gpt2" else "gpt_neox"
    with pytest.raises(UnsupportedFamily, match=rf"stages\.t: kernels: liger for a {family} model"):
        show(data_stage(), training("distil", steps=1, kernels="liger", **models))


def test_scores_of_another_kind(show):
    prune = {"name": "b", "kind": "prune", "model": WIDE, "target": {"num_layers": 1}, "score": "magnitude"}
    show(prune, prune | {"name": "t", "scores": "b"})
    with pytest.raises(StageError, match="score is gradient, but the scores of 'b' are of kind magnitude"):
        show(prune, prune | {"name": "t", "scores": "b", "score": "gradient"})


def test_a_vocabulary_of_unknown_size_hides_no_other_mistake(show):
    """Only the number of rows is unknown until the tokens are added; heads, width, family and positions are not."""
    shape = SMALL | {"hidden_size": 16, "num_heads": 4, "num_key_value_heads": 2, "max_positions": LENGTH}
    grown = {"name": "v", "kind": "expand_vocabulary", "model": {"random": shape}, "tokenizer": "tok", "donor": "donor"}
    adapted = training("adapt", name="a", model="v", steps=1)
    cut = {"name": "t", "kind": "prune", "model": "a", "score": "magnitude", "target": {"num_heads": 2}}
    stages = [data_stage(), grown, adapted]
    assert "the model's shape is unknown on this machine, and so is the pruned one's" in show(*stages, cut)[1]
    with pytest.raises(ShapeError, match="a target of 1 query heads, but 2 share each key-value head"):
        show(*stages, cut | {"target": {"num_heads": 1}})
    student = training("distil", name="t", steps=1, model="p", teacher="a")
    show(*stages, cut | {"name": "p"}, student)
    split = {"source": "a", "placement": "tensor_parallel", "tensor_parallel_ranks": 4}
    with pytest.raises(ShapeError, match="2 key-value heads are not divisible by 4 ranks"):
        show(*stages, cut | {"name": "p"}, student | {"teacher": split})
    with pytest.raises(RecipeError, match=r"stages\.a: blocks of 256 tokens for a model of 255 positions"):
        show(data_stage(), grown | {"model": {"random": shape | {"max_positions": 255}}}, adapted)


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({}, []),
        ({"score": "random", "seed": 3}, []),
        ({"score": "magnitude", "seed": 3, "sequences": 4}, ["seed with score magnitude", "sequences with score m"]),
        ({"scores": "b", "precision": "float32"}, ["precision with scores that are reused"]),
        ({"depth": "importance", "target": {"num_layers": 1}}, []),
        ({"depth": "importance", "target": {"intermediate_size": 4}}, ["depth importance with a target that keeps a"]),
        ({"norm_compensation": "rms", "target": {"sparsity": 20}}, []),
        ({"norm_compensation": "rms", "target": {"num_layers": 1}}, ["norm_compensation rms with a target that k"]),
    ],
)
def test_a_setting_of_pruning_without_effect_is_told(show, changes, unread):
    wide = {"random": SMALL | {"max_positions": LENGTH, "hidden_size": 16}}
    prune = {"name": "t", "kind": "prune", "model": wide, "data": "c", "target": {"num_layers": 1}}
    before = [data_stage(), prune | {"name": "b"}]
    notes = [note for note in show(*before, prune | changes)[1] if note.startswith("not used: ")]
    assert len(notes) == len(unread)
    assert all(note.startswith(f"not used: {start}") for note, start in zip(notes, unread, strict=True))


@pytest.mark.parametrize(("kept", "told"), [(0, True), (2, False)])
def test_keeping_some_of_all_checkpoints_is_told(show, kept, told):
    model = {"random": SMALL | {"max_positions": LENGTH}}
    stage = training("adapt", model=model, keep_checkpoints=kept, keep_every_steps=2)
    note = "not used: keep_every_steps 2 with keep_checkpoints 0, which keeps all"
    assert (note in show(data_stage(), stage)[1]) == told


@pytest.mark.parametrize(
    ("weights", "read"),
    [
        ((None, None), "every token once"),
        ((3.0,), "every token once"),
        ((None, 3.0), "until each source has been read once, others again by weight"),
    ],
)
def test_how_much_is_read_without_a_budget(show, weights, read):
    sources = [{"embedded": name, "weight": weight} for name, weight in zip(("sotu", "poems"), weights, strict=False)]
    assert show(data_stage(sources=sources))[0]["tokens"] == f"{read}, in blocks of 256"
