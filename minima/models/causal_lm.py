"""Stock causal language models: load whole, and reach backbone and head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minima.batch import Batch
from minima.models.attention import attention_mask
from minima.models.families import family_of
from minima.models.stock import build_empty
from minima.models.weights import WeightSource


def load_plain(source: WeightSource, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A whole model on the CPU of this process, for models that fit there."""
    model = build_empty(source.config, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name))
    return model.eval()


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: token ids in, final hidden states out."""
    return model.base_model


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last layer."""
    return model.get_submodule(family_of(model.config.model_type).final_norm)


def hidden_states(model: PreTrainedModel, batch: Batch, embeddings_BTD: Tensor | None = None) -> Tensor:
    """Final hidden states after the last norm, [B, T, D], what the head multiplies.

    Args:
        model: a stock model.
        batch: its `documents_BT` keep documents apart, where it has them.
        embeddings_BTD: taken instead of the tokens' embeddings.
    """
    given: dict[str, Any] = {"input_ids": batch.input_ids_BT}
    if embeddings_BTD is not None:
        given = {"inputs_embeds": embeddings_BTD}
    if batch.documents_BT is not None:
        mask = attention_mask(model.config, batch.documents_BT, model.dtype)
        given |= {"attention_mask": mask, "position_ids": batch.positions_BT}
    return backbone(model)(**given, use_cache=False).last_hidden_state


def head_weight(model: PreTrainedModel) -> nn.Parameter:
    """The output head [V, D]; the embedding where they are tied.

    Under ZeRO-3 it is whole only while the root module's forward runs.
    """
    return model.get_output_embeddings().weight
