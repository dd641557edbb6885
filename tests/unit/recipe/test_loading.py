"""Recipes: what is read, what is refused, and how the refusal reads."""

import copy
import typing
from pathlib import Path

import pytest
import yaml

from minima.errors import RecipeError, ShapeError
from minima.models.shape import ModelShape
from minima.recipe.loading import load_recipe, resolved_yaml
from minima.recipe.problems import _ELSEWHERE
from minima.recipe.references import references, unread
from minima.recipe.schema import AnyStage, Recipe

SHAPE = {"vocabulary_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4}
TRAINING = {"data": "corpus", "batch_sequences": 8, "micro_batch_sequences": 4, "steps": 4, "learning_rate": 0.001}
RECIPE = {
    "name": "tiny",
    "stages": [
        {"name": "corpus", "kind": "build_data", "sources": [{"embedded": "sotu"}], "sequence_length": 64,
         "tokenizer": {"vocabulary_size": 512}},
        {"name": "teacher", "kind": "adapt", "model": {"random": SHAPE}, **TRAINING},
        {"name": "pruned", "kind": "prune", "model": "teacher", "data": "corpus", "target": {"hidden_size": 16}},
        {"name": "student", "kind": "distil", "model": "pruned", "teacher": "teacher", **TRAINING},
        {"name": "quality", "kind": "evaluate", "models": ["teacher", "student@2"], "data": "corpus"},
        {"name": "out", "kind": "export", "model": "student"},
    ],
    "summary": {"student": {"loss": "quality.student@2.loss"}},
}  # fmt: skip


@pytest.fixture
def recipe():
    return copy.deepcopy(RECIPE)


@pytest.fixture
def load(tmp_path):
    def load(content, *overrides):
        path = tmp_path / "tiny.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return load_recipe(path, overrides)

    return load


def test_round_trip(load, recipe):
    first = load(recipe)
    assert load(resolved_yaml(first)) == first


@pytest.mark.parametrize(
    ("override", "where", "meant"),
    [
        ("stages.student.learnin_rate=1", "stages.student.learnin_rate", "learning_rate"),
        ("stages.teacher.model.random.num_head=4", "stages.teacher.model.random.num_head", "num_heads"),
        ("stages.pruned.target.hiden_size=4", "stages.pruned.target.hiden_size", "hidden_size"),
        ("stages.corpus.sources.0.embeded=sotu", "stages.corpus.sources.0.embeded", "embedded"),
        ("stages.corpus.tokenizer.vocab_size=512", "stages.corpus.tokenizer.vocab_size", "vocabulary_size"),
        ("lancher=local", "lancher", "launcher"),
        ("stages.student.lr=1", "stages.student.lr", "learning_rate"),
        ("stages.student.max_steps=1", "stages.student.max_steps", "steps"),
        ("stages.student.bf16=true", "stages.student.bf16", "precision"),
        ("stages.corpus.max_length=9", "stages.corpus.max_length", "sequence_length"),
    ],
)
def test_unknown_key_names_its_place_and_the_nearest(load, recipe, override, where, meant):
    with pytest.raises(RecipeError) as error:
        load(recipe, override)
    assert f"{where}: no such key; did you mean {meant!r}?" in str(error.value)


def test_what_other_programs_call_a_key_leads_to_one_that_there_is():
    kinds = [kind.model_fields for kind in typing.get_args(typing.get_args(AnyStage)[0])]
    assert set(_ELSEWHERE) <= {name for fields in kinds for name in fields} | set(ModelShape.model_fields)


def test_unknown_key_with_nothing_near_lists_the_known(load, recipe):
    with pytest.raises(RecipeError, match=r"known keys are .*learning_rate"):
        load(recipe, "stages.student.zzzzzz=1")


def test_unknown_kind_is_answered_with_the_nearest(load, recipe):
    recipe["stages"][3]["kind"] = "distill"
    with pytest.raises(RecipeError, match=r"stages.student: kind 'distill' is not known; did you mean 'distil'"):
        load(recipe)


def test_every_problem_is_listed_once(load, recipe):
    del recipe["stages"][1]["learning_rate"]
    with pytest.raises(RecipeError) as error:
        load(recipe, "stages.student.steps=many", "ranks=0")
    text = str(error.value)
    assert "3 problems" in text
    assert "stages.teacher.learning_rate: is missing" in text
    assert "stages.student.steps:" in text and "'many'" in text
    assert "ranks: must be greater than 0, not 0" in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "stages.student.batch_sequences=eight",
            "stages.student.batch_sequences: must be a whole number, not 'eight'",
        ),
        ("stages.student.learning_rate=fast", "stages.student.learning_rate: must be a number, not 'fast'"),
        ("stages.student.tensorboard=maybe", "stages.student.tensorboard: must be true or false, not 'maybe'"),
        ("summary=7", "summary: must be a block of keys, not 7"),
        ("stages.student.batch_sequences=10", "stages.student: batch_sequences 10 is not a multiple"),
    ],
)
def test_the_place_and_the_value_as_they_were_written(load, recipe, override, said):
    with pytest.raises(RecipeError) as error:
        load(recipe, override)
    assert error.value.what == f"tiny.yaml: {said}" or error.value.what.startswith(f"tiny.yaml: {said} ")


def test_a_study_is_not_the_recipe_of_one_run(load):
    with pytest.raises(RecipeError, match="minima law study"):
        load({"name": "x", "teachers": {}, "students": {}})


def test_an_error_of_a_fields_own_check_keeps_its_class_and_parts(load, recipe):
    with pytest.raises(ShapeError) as error:
        load(recipe, "stages.teacher.model.random.num_heads=5")
    assert "stages.teacher.model.random" in error.value.what
    assert error.value.do == "choose hidden_size as a multiple of num_heads"


def test_two_lengths_are_refused(load, recipe):
    with pytest.raises(RecipeError, match="steps and tokens"):
        load(recipe, "stages.student.tokens=1000")
    assert load(recipe, "stages.student.tokens=1000", "stages.student.steps=null").stage("student").tokens == 1000


def test_liger_and_the_compiler_are_refused_together(load, recipe):
    with pytest.raises(RecipeError, match="compile: true with kernels: liger"):
        load(recipe, "stages.student.compile=on", "stages.student.kernels=liger")


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: x\nstages: [", 2), ("name: x\n  stages: y", 2), ("name: x\nname: y\n", 2), ("a: {b: 1, b: 2}", 1)],
)
def test_broken_yaml_names_its_line(load, text, line):
    with pytest.raises(RecipeError, match=f"line {line}, column"):
        load(text)


@pytest.mark.parametrize("text", ["", "- a\n", "just words"])
def test_a_file_without_keys_is_refused(load, text):
    with pytest.raises(RecipeError, match="not keys and values"):
        load(text)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E-4", 1e-4), ("1.5e-3", 1.5e-3), ("2", 2.0)])
def test_numbers_without_a_point(load, recipe, text, value):
    assert load(recipe, f"stages.student.learning_rate={text}").stage("student").learning_rate == value
    dumped = yaml.safe_dump(recipe).replace("learning_rate: 0.001", f"learning_rate: {text}")
    assert load(dumped).stage("student").learning_rate == value


def test_large_counts_may_have_an_exponent(load, recipe):
    tokens = load(recipe, "stages.student.steps=null", "stages.student.tokens=126e9").stage("student").tokens
    assert tokens == 126_000_000_000 and isinstance(tokens, int)


def test_text_that_only_begins_like_a_number_stays_text(load, recipe):
    assert load(recipe, "stages.out.licence=3e-4x").stage("out").licence == "3e-4x"


@pytest.mark.parametrize("override", ["stages.student", "=3", "stages..x=1", "a b"])
def test_malformed_overrides_are_refused(load, recipe, override):
    with pytest.raises(RecipeError, match=r"key\.path=value|names no stage"):
        load(recipe, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.quality.models.0.revision=main", "asks for a key of '0', which is 'teacher'"),
        ("stages.quality.models.0.revision.x=main", "asks for a key of '0', which is 'teacher'"),
        ("stages.quality.models.2=pruned", "entry '2' of a list of 2"),
        ("stages.student=1", "names a stage, but none of its keys"),
    ],
)
def test_overrides_that_reach_nothing_are_refused(load, recipe, override, words):
    with pytest.raises(RecipeError, match=words):
        load(recipe, override)


def test_override_of_no_stage_names_the_nearest(load, recipe):
    with pytest.raises(RecipeError, match="did you mean 'student'"):
        load(recipe, "stages.studnt.steps=3")


def test_override_reaches_a_stage_whose_name_has_points(load, recipe):
    recipe["stages"][5]["name"] = "out.v1.2"
    assert load(recipe, "stages.out.v1.2.dtype=float32").stage("out.v1.2").dtype == "float32"


def test_override_into_a_model_given_as_a_string(load, recipe):
    recipe["stages"][3]["model"] = "org/model"
    model = load(recipe, "stages.student.model.revision=abc").stage("student").model
    assert (model.source, model.revision) == ("org/model", "abc")


def test_override_into_a_reference_given_as_a_string(load, recipe):
    aligned = {**recipe["stages"][1], "name": "aligned", "kind": "align", "reference": "org/chat"}
    recipe["stages"].append(aligned)
    reference = load(recipe, "stages.aligned.reference.revision=main").stage("aligned").reference
    assert (reference.source, reference.revision) == ("org/chat", "main")


def test_an_anchor_that_holds_itself_is_refused(load):
    for text in ("name: x\nstages: &a [*a]\n", "name: x\nstages: &a {b: {c: *a}}\n"):
        with pytest.raises(RecipeError, match="holds an alias of itself"):
            load(text)


@pytest.mark.parametrize("key", ["steps", "learning_rate", "weight_decay", "seed", "patience", "teacher.source"])
def test_true_is_no_number_and_no_name(load, recipe, key):
    with pytest.raises(RecipeError, match=f"{key.rpartition('.')[2]} is true"):
        load(recipe, f"stages.student.{key}=on")
    assert load(recipe, "stages.student.compile=on").stage("student").compile is True


def test_override_leaves_what_a_yaml_anchor_shares(load):
    text = """
name: x
stages:
  - {name: c, kind: build_data, sources: [{embedded: sotu}], tokenizer: {vocabulary_size: 512}, sequence_length: 64}
  - &p {name: a, kind: prune, model: org/m, score: magnitude, target: {hidden_size: 16}}
  - {<<: *p, name: b, seed: 2}
"""
    recipe = load(text, "stages.a.target.hidden_size=8")
    assert recipe.stage("a").target.hidden_size == 8
    assert recipe.stage("b").target.hidden_size == 16
    assert recipe.stage("b").seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.teacher.data=student", "a later stage"),
        ("stages.teacher.data=teacher", "the stage itself"),
        ("stages.pruned.model=student@3", "a later stage"),
        ("stages.student.data=teacher", "a stage of kind adapt"),
        ("stages.student.teacher=corpus", "a stage of kind build_data"),
        ("stages.pruned.scores=teacher", "kind prune"),
        ("stages.out.model=pruned@3", "asks for a step of a stage of kind prune"),
        ("stages.quality.models=[teacher, quality]", "models.1.*the stage itself"),
        ("summary.x=nowhere.loss", "names no stage's metric"),
        ("summary.x=3", "names no stage's metric"),
        ("summary.x=[]", r"summary\.x is an empty list"),
        ("summary.x={y: []}", r"summary\.x\.y is an empty list"),
        ("summary.tokens=student.tokens", r"summary\.tokens: the summary has its own 'tokens'"),
        ("summary.seconds=student.seconds", r"summary\.seconds: the summary has"),
        ("summary.export={out: out.bytes}", r"summary\.export: the summary has"),
        ("summary.x=quality.loss", "'quality.loss' names no model of stage 'quality'"),
        ("summary.x=quality.techer.loss", "names no model of stage 'quality'; did you mean 'teacher'"),
        ("summary.x=[quality.teacher.loss, quality.student.loss]", r"'quality\.student\.loss' names no model"),
    ],
)
def test_references_that_cannot_hold_are_refused(load, recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        load(recipe, override)


@pytest.mark.parametrize(
    "override",
    ["learning_rate=.inf", "learning_rate=.nan", "betas=[0.9, 1.0]", "betas=[-0.1, 0.95]", "weight_decay=.inf",
     "gradient_clip=.inf", "epsilon=.inf", "temperature=.inf", "soft_weight=.nan"],
)  # fmt: skip
def test_numbers_that_no_run_survives_are_refused(load, recipe, override):
    with pytest.raises(RecipeError, match=rf"stages\.student\.{override.partition('=')[0]}"):
        load(recipe, f"stages.student.{override}")


@pytest.mark.parametrize("name", ["tokens", "seconds", "export"])
def test_a_name_of_the_summarys_own_may_stand_below_another(load, recipe, name):
    assert load(recipe, f"summary.student.{name}=student.tokens").summary["student"][name] == "student.tokens"


def test_export_is_a_free_name_where_nothing_is_exported(load, recipe):
    recipe["stages"] = [stage for stage in recipe["stages"] if stage["kind"] != "export"]
    assert load(recipe, "summary.export=student.tokens").summary["export"] == "student.tokens"


@pytest.mark.parametrize(("model", "stage"), [("/a/b.c", "quality"), ("teacher", "quality.long")])
def test_stages_and_models_of_the_summary_may_hold_points(load, recipe, model, stage):
    recipe["stages"].append(recipe["stages"][4] | {"name": "quality.long"})
    recipe["stages"][4]["models"].append("/a/b.c")
    assert load(recipe, f"summary.x={stage}.{model}.loss").summary["x"] == f"{stage}.{model}.loss"


def test_a_name_that_cannot_be_a_folders_is_told_in_words(load, recipe):
    with pytest.raises(RecipeError, match=r"name: must be letters, digits, '_', '\.' and '-', .* not 'my run'"):
        load(recipe, "name=my run")


@pytest.mark.parametrize(
    ("overrides", "said", "mended"),
    [
        (["warmup_steps=2", "warmup_fraction=0.1"], "warmup_steps 2 with warmup_fraction 0.1", "warmup_steps=null"),
        (["warmup_steps=2", "warmup_fraction=0.1"], "only the steps would be used", "warmup_fraction=0.01"),
        (
            ["schedule=constant", "final_learning_rate_fraction=0.1"],
            "schedule: constant with final_learning_rate_fraction 0.1",
            "final_learning_rate_fraction=0",
        ),
        (["evaluate_sequences=4"], "evaluate_sequences 4 with evaluate_every_steps 0", "evaluate_sequences=null"),
    ],
)
def test_what_a_training_stage_would_not_read_is_refused(load, recipe, overrides, said, mended):
    given = [f"stages.student.{override}" for override in overrides]
    with pytest.raises(RecipeError, match=said) as error:
        load(recipe, *given)
    assert mended in error.value.do
    loaded = load(recipe, *given, f"stages.student.{mended}")
    assert load(resolved_yaml(loaded)) == loaded


@pytest.mark.parametrize(
    ("overrides", "stage", "told"),
    [
        (["stages.student.model={source: pruned, revision: main}"], "student", "model.revision 'main' with a stage"),
        (["stages.student.model={source: teacher@2, revision: main}"], "student", "model.revision 'main' with a stage"),
        (["stages.student.model={source: org/m, revision: main}"], "student", None),
        (["stages.teacher.model.revision=main"], "teacher", "model.revision with random weights"),
        (
            ["stages.student.soft_weight=0", "stages.student.temperature=2"],
            "student",
            "temperature 2 with soft_weight 0",
        ),
        (["stages.student.temperature=2"], "student", None),
        (
            ["stages.student.soft_weight=0", "stages.student.teacher={source: teacher, window_micro_batches: 4}"],
            "student",
            "teacher.window_micro_batches with soft_weight 0",
        ),
        (["stages.student.soft_weight=0", "stages.student.teacher={source: teacher}"], "student", None),
    ],
)
def test_what_a_begun_stage_may_keep_though_nothing_reads_it_is_told(load, recipe, overrides, stage, told):
    loaded = load(recipe, *overrides)
    found = unread(loaded, loaded.stage(stage))
    assert told in found[0] if told else not found, found


@pytest.mark.parametrize(
    ("source", "idle"),
    [
        ({"path": "a.txt", "split": "test", "config": "en"}, "config, split, which are not used with `path`"),
        ({"path": "a.txt", "revision": "main"}, "revision, which is not used with `path`"),
        ({"path": "a.txt", "streaming": True}, "streaming, which is"),
        ({"hub": "org/text", "format": "jsonl"}, "format, which is not used with `hub`"),
        ({"embedded": "sotu", "format": "text"}, "format, which is not used with `embedded`"),
        ({"embedded": "sotu", "field": "content"}, "field, which is"),
        ({"embedded": "sotu", "split": "test"}, "split, which is"),
    ],
)
def test_what_a_source_would_not_read_is_refused(load, recipe, source, idle):
    recipe["stages"][0]["sources"] = [source]
    with pytest.raises(RecipeError, match=idle):
        load(recipe)


def test_a_field_of_records_whose_layout_is_told_from_them_is_refused(load, recipe):
    del recipe["stages"][0]["sources"]
    recipe["stages"][0] |= {"format": "conversations", "sources": [{"path": "a.jsonl", "field": "messages"}]}
    recipe["stages"][0]["tokenizer"] = "org/model"
    with pytest.raises(RecipeError, match=r"gives a\.jsonl a field, for conversations"):
        load(recipe)
    del recipe["stages"][0]["sources"][0]["field"]
    assert load(resolved_yaml(load(recipe)))


@pytest.mark.parametrize(
    "source",
    [
        {"path": "a.txt", "format": "jsonl", "field": "content"},
        {"hub": "org/text", "config": "en", "split": "test", "revision": "main", "streaming": True, "field": "content"},
        {"embedded": "sotu", "max_documents": 3, "weight": 2},
    ],
)
def test_what_a_source_reads_may_be_set_and_written_out(load, recipe, source):
    recipe["stages"][0]["sources"] = [source]
    loaded = load(recipe)
    assert load(resolved_yaml(loaded)) == loaded


def test_a_name_that_is_no_stage_is_a_path_or_hub_id(load, recipe):
    recipe = load(recipe, "stages.student.teacher=org/model@12", "stages.quality.models=[student@2, /a/b]")
    teacher = references(recipe, recipe.stage("student"))[1]
    assert (teacher.stage, teacher.text) == (None, "org/model@12")
    found = [(reference.stage, reference.step) for reference in references(recipe, recipe.stage("quality"))]
    assert found == [("student", 2), (None, None), ("corpus", None)]


def test_shipped_recipes_load(root: Path):
    recipes = sorted((root / "recipes").glob("*.yaml"))
    assert {path.stem for path in recipes} >= {"quickstart", "minima-3b"}
    for path in recipes:
        if not path.stem.startswith("law-"):  # those are `minima law study`'s
            assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("name", ["lock", "logs", "recipe.yaml", "summary.json", "hub.json"])
def test_a_stage_may_not_take_the_name_of_a_file_of_the_run(name):
    stage = {"name": name, "kind": "export", "model": "m"}
    with pytest.raises(ValueError, match="has a file or folder of its own"):
        Recipe.model_validate({"name": "r", "stages": [stage]})


@pytest.mark.parametrize("closed", [0, 5000])
def test_brackets_in_brackets_are_refused(load, closed):
    with pytest.raises(RecipeError, match="nested too deeply"):
        load("name: " + "[" * 5000 + "]" * closed)


def test_aliases_of_aliases_are_refused_before_they_fill_the_memory(load):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(RecipeError, match="with its aliases written out it has more than 1,000,000 values"):
        load("\n".join(lines))


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("stages.corpus.sources.0.path=https://u:secret@host/x.txt", "stages.0.sources.0.path"),
        ("output=runs/hf_VerySecret0VerySecret1VerySecret2VS", "output"),
    ],
)
def test_a_token_is_refused_before_it_is_copied_into_the_run(load, recipe, override, place):
    with pytest.raises(RecipeError, match=f"{place} holds what looks like a token or a password") as refused:
        load(recipe, override)
    assert "secret@" not in str(refused.value) and "VerySecret" not in str(refused.value)


@pytest.mark.parametrize("name", ["hf_llama27bconvertedweights", "sk-proj-llama-distilled-chat-model-v2"])
def test_a_name_like_a_token_is_none(load, recipe, name):
    assert load(recipe, f"output=runs/{name}").output == f"runs/{name}"
