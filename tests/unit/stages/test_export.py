"""Export and evaluate in one process, with plain models in place of sharded ones. Two ranks: tests/pipeline."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.vocab import SpecialVocab
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from minima.data.piece_training import train_sentencepiece
from minima.data.tokenizer import load_tokenizer, save_tokenizer, write_tokenizer
from minima.disk import write_json
from minima.engine import distributed
from minima.errors import CheckpointError, DiskFull, NotFinite
from minima.launcher import Launch
from minima.models.causal_lm import head_weight, hidden_states, load_plain
from minima.models.shape import ModelShape
from minima.models.stock import DTYPES
from minima.models.weights import RandomSource, write_folder
from minima.recipe.schema import Recipe
from minima.stages import evaluate as evaluate_stage
from minima.stages import export as export_stage
from minima.stages.context import StageContext
from minima.stages.release.generation_settings import CHAT_SAMPLING
from tests.chat_model import ANSWER, QUESTION, WINDOW
from tests.fakes import TextStore

SHAPE = {"vocabulary_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2}
RECIPE = Recipe(
    name="test",
    stages=[
        {"name": "corpus", "kind": "build_data", "sources": [{"embedded": "sotu"}], "tokenizer": "t",
         "sequence_length": 8},
        {"name": "cut", "kind": "prune", "model": "t", "target": {"num_layers": 2}, "score": "random"},
        {"name": "student", "kind": "distil", "model": "cut", "teacher": "t", "data": "corpus", "batch_sequences": 4,
         "micro_batch_sequences": 2, "steps": 10, "learning_rate": 1e-3, "precision": "bfloat16"},
        {"name": "quality", "kind": "evaluate", "models": ["cut"], "teacher": "cut", "data": "corpus"},
        {"name": "tuned", "kind": "instruct", "model": "student", "data": "corpus", "batch_sequences": 4,
         "micro_batch_sequences": 2, "steps": 10, "learning_rate": 1e-3, "precision": "bfloat16"},
        {"name": "out", "kind": "export", "model": "cut", "licence": "apache-2.0", "shard_bytes": 8000},
    ],
)  # fmt: skip


class PlainHost:
    """A whole model with the face of a FrozenHost."""

    open = 0
    device = torch.device("cpu")

    def __init__(self, source, config, *, precision):
        self.config = source.config
        self.model = load_plain(source, DTYPES[precision])
        self.head_VE = head_weight(self.model).detach()
        PlainHost.open += 1

    def hidden_states(self, batch):
        return hidden_states(self.model, batch)

    def close(self):
        PlainHost.open -= 1


class Store(TextStore):
    sequence_length = 8

    def __len__(self):
        return 5

    def blocks(self, indices):
        return np.random.default_rng(0).integers(0, 48, (5, 8))[indices]


@pytest.fixture
def context(tmp_path, monkeypatch):
    """Of the export stage: its model was pruned, and the prune stage is finished."""
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: value)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor)
    monkeypatch.setattr(export_stage, "FrozenHost", PlainHost)
    monkeypatch.setattr(evaluate_stage, "FrozenHost", PlainHost)
    PlainHost.open = 0
    source = RandomSource(ModelShape(**SHAPE, rope_theta=5000.0).to_config() | {"initializer_range": 0.3}, 1)
    write_folder(tmp_path / "cut" / "model", source.config, ((name, source.read(name)) for name in source.names()))
    for name, metrics in {"cut": {}, "quality": {"cut": {"loss": 3.5}}, "corpus": {}, "out": None}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        if metrics is not None:
            write_json(tmp_path / name / "manifest.json", {"metrics": metrics})
    return StageContext(RECIPE, Path("recipe.yaml"), RECIPE.stage("out"), tmp_path / "out", tmp_path, Launch())


@pytest.mark.parametrize(
    ("dtype", "value", "told"),
    [
        ("float16", 1e6, r"has values up to 1e\+06, but the maximum of float16 is 65504.*bfloat16"),
        ("float32", float("nan"), "has values that are infinite or NaN.*STAGE@STEP"),
    ],
)
def test_what_is_not_finite_is_named_and_nothing_of_it_stays(context, dtype, value, told):
    path = context.run_folder / "cut" / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    save_file(tensors, path)
    out = for_stage(context, "out", dtype=dtype)
    with pytest.raises(NotFinite, match=rf"(?s)tensor model\.layers\.1\.mlp\.down_proj\.weight {told}"):
        export_stage.run(out)
    assert not list(out.folder.glob("model*"))


def test_a_full_disk_is_left_as_full_as_it_was(context, monkeypatch):
    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_stage, "write_json", full)
    with pytest.raises(DiskFull):
        export_stage.run(context)
    assert not list(context.folder.glob("model*"))


def for_stage(context, name, **changes):
    stage = RECIPE.stage(name).model_copy(update=changes)
    return StageContext(RECIPE, context.recipe_path, stage, context.run_folder / name, context.run_folder, Launch())


def test_an_export_is_the_trained_model(context):
    metrics = export_stage.run(context)
    folder = context.folder / "model"
    assert not (context.folder / "model.partial").exists()
    assert metrics["max_logit_difference"] < 1e-5
    assert metrics["checked_by"] == ["transformers", "zero3"]
    assert metrics["files"] == len(list(folder.glob("*.safetensors"))) > 1
    expected = load_plain(RandomSource(json.loads((folder / "config.json").read_text()), 1)).state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    card = (folder / "README.md").read_text()
    assert "| cut | 3.5000 |" in card
    assert f"{metrics['parameters']:,} parameters" in card
    assert PlainHost.open == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_compared_after_rounding(context, dtype):
    metrics = export_stage.run(for_stage(context, "out", dtype=dtype, shard_bytes=10**9))
    assert metrics["dtype"] == dtype
    assert metrics["max_logit_difference"] < 1e-5
    tensors = load_file(context.folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[dtype]}


def test_damage_on_disk_is_found_and_named(context, monkeypatch):
    def damaged(folder, *arguments, **options):
        hashes = write_folder(folder, *arguments, **options)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][3] += 1e-3
        save_file(tensors, path)
        return hashes

    monkeypatch.setattr(export_stage, "write_folder", damaged)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        export_stage.run(for_stage(context, "out", shard_bytes=10**9))
    assert not (context.folder / "model").exists()


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"hidden_act": "gelu"}]
)
def test_a_config_of_another_model_is_not_published(context, monkeypatch, change):
    def misdescribed(folder, *arguments, **options):
        hashes = write_folder(folder, *arguments, **options)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        return hashes

    monkeypatch.setattr(export_stage, "write_folder", misdescribed)
    with pytest.raises(CheckpointError, match="differ from the trained model's"):
        export_stage.run(context)
    assert not (context.folder / "model").exists()


def test_what_plain_transformers_loads_is_compared_too(context, monkeypatch):
    monkeypatch.setattr(export_stage, "plain_logits", lambda folder, batch, dtype: torch.zeros(128, 48))
    with pytest.raises(CheckpointError, match="plain transformers"):
        export_stage.run(context)


def test_a_model_beyond_half_of_the_memory_is_not_loaded_whole(context, monkeypatch):
    monkeypatch.setattr(export_stage, "_HOST_SHARE", 0.0)
    monkeypatch.setattr(export_stage, "plain_logits", None)
    assert export_stage.run(context)["checked_by"] == ["zero3"]


def test_logits_that_are_rounded_are_not_compared_with_plain_ones(context, monkeypatch):
    monkeypatch.setattr(export_stage, "fits_host", lambda parameters: True)
    monkeypatch.setattr(export_stage, "fits_devices", lambda parameters: False)
    assert export_stage.run(for_stage(context, "out", dtype="bfloat16"))["checked_by"] == ["zero3"]


def test_dtype_is_that_of_training(context):
    source = RandomSource(ModelShape(**SHAPE).to_config(), 1)
    assert export_stage.trained_dtype(context, source) == "float32"
    for model in ("student@5", "tuned"):
        assert export_stage.trained_dtype(for_stage(context, "out", model=model), source) == "bfloat16"


def test_the_tokenizer_comes_along_and_its_padding_freezes_no_embedding(context):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "state": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(context.run_folder / "cut" / "model")
    export_stage.run(context)
    folder = context.folder / "model"
    assert AutoTokenizer.from_pretrained(folder)("state")["input_ids"] == [2]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 1, "pad_token_id": 1}
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == 1
    assert config.get("pad_token_id") is None


def test_a_tokenizer_that_plain_programs_would_misread_is_told(context, caplog):
    qwen2 = RandomSource(ModelShape(family="qwen2", **SHAPE).to_config(), 1)
    folder = context.run_folder / "cut" / "model"
    shutil.rmtree(folder)
    write_folder(folder, qwen2.config, ((name, qwen2.read(name)) for name in qwen2.names()))
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "state": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    export_stage.run(context)
    exported = context.folder / "model"
    assert "AutoTokenizer uses Qwen2Tokenizer for a qwen2" in caplog.text
    assert "PreTrainedTokenizerFast.from_pretrained(folder)" in (exported / "README.md").read_text()
    assert PreTrainedTokenizerFast.from_pretrained(exported)("state")["input_ids"] == [2]


@pytest.mark.parametrize("begin", [False, True])
def test_llama_cpp_is_told_whether_a_text_begins_with_a_token(tmp_path, begin):
    """Of a SentencePiece model it believes so, unless told otherwise; transformers 5 does not write it down."""
    write_tokenizer(train_sentencepiece(["to be or not to be"] * 5, 270), tmp_path / "made")
    tokenizer = load_tokenizer(tmp_path / "made")
    tokenizer.add_bos_token = begin
    save_tokenizer(tokenizer, tmp_path / "made", tmp_path / "saved")
    (tmp_path / "export").mkdir()
    export_stage.copy_tokenizer(tmp_path / "saved", tmp_path / "export")
    added = SpecialVocab(tmp_path / "export").add_special_token
    assert (added["bos"], added["eos"]) == (begin, False)
    assert load_tokenizer(tmp_path / "export")("to be")["input_ids"] == tokenizer("to be")["input_ids"]


def test_a_tokenizer_that_does_not_load_comes_along_as_it_is(tmp_path):
    (tmp_path / "made").mkdir(), (tmp_path / "export").mkdir()
    write_json(tmp_path / "made" / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "note": 1})
    (tmp_path / "made" / "tokenizer.json").write_text("{")
    export_stage.copy_tokenizer(tmp_path / "made", tmp_path / "export")
    kept = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert kept == {"tokenizer_class": "LlamaTokenizer", "note": 1}


def test_an_exported_chat_model_answers_through_transformers_own_pipeline(context, chat_folder, capfd):
    tuned = context.run_folder / "tuned"
    shutil.copytree(chat_folder, tuned / "model")
    shutil.copytree(chat_folder, tuned / "tokenizer", ignore=shutil.ignore_patterns("model*", "config.json"))
    write_json(tuned / "manifest.json", {"metrics": {}})
    export_stage.run(for_stage(context, "out", model="tuned", dtype="float32"))
    folder = context.folder / "model"
    assert (folder / "chat_template.jinja").read_bytes() == (chat_folder / "chat_template.jinja").read_bytes()
    chat = pipeline("text-generation", model=str(folder), device="cpu")
    messages = [{"role": "user", "content": QUESTION}]
    [told] = chat(messages, do_sample=False, temperature=None, top_p=None)
    assert told["generated_text"] == [*messages, {"role": "assistant", "content": ANSWER}], "it ends at the stop id"
    capfd.readouterr()
    answers = {chat(messages)[0]["generated_text"][-1]["content"] for _ in range(2)}  # as its folder suggests
    assert answers == {ANSWER}
    said = capfd.readouterr().err
    assert "pad_token" not in said
    assert "generation flags" not in said
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | CHAT_SAMPLING
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == WINDOW
    assert "llama chat model" in (folder / "README.md").read_text()


def test_a_chat_template_that_was_taken_over_makes_no_chat_model(context, chat_folder):
    export_stage.run(for_stage(context, "out", model=str(chat_folder)))
    folder = context.folder / "model"
    assert (folder / "chat_template.jinja").is_file()
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert "llama causal language model" in (folder / "README.md").read_text()


def test_evaluate_builds_the_teacher_once_and_closes_every_model(context, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_stage, "open_store", lambda folder: Store())
    built = []

    class Counted(PlainHost):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            built.append(PlainHost.open)

    monkeypatch.setattr(evaluate_stage, "FrozenHost", Counted)
    other = str(context.run_folder / "cut" / "model")
    metrics = evaluate_stage.run(for_stage(context, "quality", models=["cut", other, other + "/"]))
    assert built == [1, 2, 2]
    assert PlainHost.open == 0
    assert metrics["cut"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[other]["loss"] == metrics["cut"]["loss"]
    assert metrics["cut"]["parameters"] == ModelShape(**SHAPE).parameters
    written = json.loads((context.run_folder / "quality" / "evaluation.json").read_text())
    assert written["models"] == metrics
    assert evaluate_stage.table(metrics) in capsys.readouterr().out
