"""An export loads in the last 4.x of transformers with the same logits and the same token ids."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minima.data.chats.template_choice import set_template
from minima.data.chats.templates import chat_tokenizer
from minima.data.piece_training import train_sentencepiece
from minima.data.tokenizer import load_tokenizer, save_tokenizer, write_tokenizer
from minima.models.weights import RandomSource, write_folder
from minima.stages.export import copy_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = "to be or <mark> not"
CHAT = [
    {"role": role, "content": text}
    for role, text in [("system", "be brief"), ("user", "who are you"), ("assistant", " a small 模型\n"),
                       ("user", "why"), ("assistant", "ok")]
]  # fmt: skip
WORDS = {word: number for number, word in enumerate(["<unk>", "</s>", "<mark>", "to", "be", "or", "not"])}
COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
# No rotary base here is a default, and every model has more than one frequency to show it with.
CONFIGS = {
    "llama": COMMON | {"rope_theta": 123456.0, "tie_word_embeddings": True},
    "llama-scaled": COMMON
    | {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 123456.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": COMMON | {"rope_theta": 123456.0, "sliding_window": None},
    "qwen2": COMMON | {"rope_theta": 123456.0},
    "qwen3": COMMON | {"rope_theta": 123456.0, "head_dim": 16},
    "gpt_neox": COMMON | {"rope_parameters": {"rope_theta": 123.0, "partial_rotary_factor": 0.5}},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
CHILD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

root, text = Path(sys.argv[1]), sys.argv[2]
logits = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits[folder.name] = model(torch.arange(96)[None] % 64).logits.clone()
save_file(logits, root / "logits.safetensors")
ids = AutoTokenizer.from_pretrained(root / "llama")(text)["input_ids"]
chat = AutoTokenizer.from_pretrained(root / "mistral").apply_chat_template(
    json.loads(sys.argv[3]), return_assistant_tokens_mask=True, return_dict=True
)
begins = {name: AutoTokenizer.from_pretrained(root / name)("to be")["input_ids"] for name in ("llama-scaled", "qwen2")}
seen = {"version": __version__, "ids": ids, "begins": begins, "chat": {name: chat[name] for name in chat}}
(root / "seen.json").write_text(json.dumps(seen))
"""


def export(folder: Path, config: dict) -> torch.Tensor:
    """Write a random model as the export stage does; gives transformers 5's logits of the written folder."""
    source = RandomSource(config | {"initializer_range": 0.3}, seed=0)  # sharp attention: no wrong rotary base can hide
    write_folder(folder, config, ((name, source.read(name)) for name in source.names()))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(torch.arange(96)[None] % 64).logits


def write_tokenizer_of_5(folder: Path) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", extra_special_tokens=["<mark>"]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_chat_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A MiniChat's tokenizer, as build_data writes it."""
    write_tokenizer(train_sentencepiece(["who are you", "a small model", "why ok be brief"] * 5, 290), folder)
    tokenizer = load_tokenizer(folder)
    set_template(tokenizer, "minichat")
    save_tokenizer(tokenizer, folder, folder / "chat")
    return load_tokenizer(folder / "chat")


def write_llama_tokenizer(folder: Path, *, begin: bool) -> list[int]:
    """A tokenizer of the class that 4.x takes for one that puts `<s>` before a text; gives the ids of "to be"."""
    write_tokenizer(train_sentencepiece(["to be or not to be"] * 5, 270), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_bos_token = begin
    save_tokenizer(tokenizer, folder, folder / "saved")  # transformers 5 leaves `add_bos_token` out
    return tokenizer("to be")["input_ids"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What transformers 5 computed, and what the last 4.x did from the same folders."""
    target = Path(sys.prefix) / "transformers4"
    made = subprocess.run(
        [ROOT / "tools" / "make_transformers4_env.sh", target],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        assert "CI" not in os.environ, made.stderr[-2000:]  # where it counts, it may not be skipped
        pytest.skip(f"the environment could not be made: {made.stderr[-300:]}")
    root = tmp_path_factory.mktemp("exports")
    expected = {name: export(root / name, {"model_type": name} | config) for name, config in CONFIGS.items()}
    written_by_5 = tmp_path_factory.mktemp("tokenizer")
    tokenizer = write_tokenizer_of_5(written_by_5)
    copy_tokenizer(written_by_5, root / "llama")
    chat = write_chat_tokenizer(tmp_path_factory.mktemp("chat"))
    copy_tokenizer(Path(chat.name_or_path), root / "mistral")
    begins = {}
    for name, begin in (("llama-scaled", False), ("qwen2", True)):
        folder = tmp_path_factory.mktemp(name)
        begins[name] = write_llama_tokenizer(folder, begin=begin)
        copy_tokenizer(folder / "saved", root / name)
    # What transformers 5 alone would have written, to see that the logits tell.
    only_5 = root / "only-5"
    export(only_5, {"model_type": "llama"} | CONFIGS["llama"])
    config = json.loads((only_5 / "config.json").read_text())
    (only_5 / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "rope_theta"}))
    subprocess.run(
        [sys.executable, "-c", CHILD, root, TEXT, json.dumps(CHAT)],
        env=os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    facts = json.loads((root / "seen.json").read_text())
    return expected, load_file(root / "logits.safetensors"), facts, tokenizer(TEXT)["input_ids"], begins, chat


@pytest.mark.network
@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_4x_gives_the_same_logits(seen, name):
    expected, found, facts, *_ = seen
    assert facts["version"].startswith("4.57.")
    torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.network
def test_without_the_old_names_it_would_be_another_model(seen):
    expected, found, *_ = seen
    assert (found["only-5"] - expected["llama"]).abs().max() > 0.1


@pytest.mark.network
def test_the_last_4x_gives_the_same_token_ids(seen):
    _, _, facts, ids, *_ = seen
    assert facts["ids"] == ids == [WORDS[word] for word in TEXT.split()]


@pytest.mark.network
def test_the_last_4x_begins_a_text_as_the_model_learnt_it(seen):
    *_, facts, _, begins, _ = seen
    assert facts["begins"] == begins
    assert begins["llama-scaled"][0] != 1 and begins["qwen2"][0] == 1


@pytest.mark.network
def test_the_last_4x_gives_the_same_chat(seen):
    """Ids and assistant mask of a shipped template, and those that the model was taught."""
    *_, facts, _, _, tokenizer = seen
    found = facts["chat"]
    expected = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    assert found["input_ids"] == expected["input_ids"]
    assert found["assistant_masks"] == expected["assistant_masks"]
    (taught,) = chat_tokenizer(tokenizer).encode([[(turn["role"], turn["content"]) for turn in CHAT]])
    assert found["input_ids"] == taught.ids
    learnt = {place for begin, end in taught.replies for place in range(begin, end)}
    assert [place for place, mask in enumerate(found["assistant_masks"]) if mask] == sorted(learnt)
    assert len(taught.replies) == 2 and learnt
