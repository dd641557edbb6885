"""Stock causal language models: load whole, and reach backbone and head."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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


def hidden_states(model: PreTrainedModel, input_ids_BT: Tensor) -> Tensor:
    """Final hidden states after the last norm, [B, T, D], what the head multiplies."""
    return backbone(model)(input_ids=input_ids_BT, use_cache=False).last_hidden_state


def head_weight(model: PreTrainedModel) -> nn.Parameter:
    """The output head [V, D]; the embedding where they are tied.

    Under ZeRO-3 it is whole only while the root module's forward runs.
    """
    return model.get_output_embeddings().weight
