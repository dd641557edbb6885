"""Stock causal language models: loading a whole one, and access to its backbone and head."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from minima.batch import Batch
from minima.models.attention import attention_mask
from minima.models.families import family_of
from minima.models.stock import build_empty
from minima.models.weights import WeightSource


def load_plain(source: WeightSource, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a whole model onto the CPU of this process, for models that fit there."""
    model = build_empty(source.config, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name))
    return model.eval()


def load_folder(folder: Path, dtype: torch.dtype | Literal["auto"] = "auto") -> PreTrainedModel:
    """Load a folder's model onto the CPU with plain transformers, without executing code from the folder.

    Args:
        dtype: of the weights; `auto` keeps the stored one.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would appear in the middle of our output
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    return model.eval()


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: token ids in, final hidden states out."""
    return model.base_model


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last layer."""
    return model.get_submodule(family_of(model.config.model_type).final_norm)


def hidden_states(model: PreTrainedModel, batch: Batch, embeddings_BTD: Tensor | None = None) -> Tensor:
    """Final hidden states after the last norm, [B, T, D]: the input of the head.

    Args:
        batch: if it has `documents_BT`, no document sees another.
        embeddings_BTD: used in place of the tokens' embeddings if given.
    """
    given: dict[str, Any] = {"input_ids": batch.input_ids_BT}
    if embeddings_BTD is not None:
        given = {"inputs_embeds": embeddings_BTD}
    if batch.documents_BT is not None:
        mask = attention_mask(model.config, batch.documents_BT, model.dtype)
        given |= {"attention_mask": mask, "position_ids": batch.positions_BT}
    return backbone(model)(**given, use_cache=False).last_hidden_state


def head_weight(model: PreTrainedModel) -> nn.Parameter:
    """The output head [V, D], which is the embedding if they are tied.

    Under ZeRO-3 it is complete only while the root module's forward runs.
    """
    return model.get_output_embeddings().weight
