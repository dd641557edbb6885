"""Text, conversations or preferences in, token blocks out. One process without ranks; it starts its own workers."""

from pathlib import Path
from typing import Any

from minima.data.builder import build
from minima.recipe.data import TokenizerTraining
from minima.recipe.schema import BuildData
from minima.stages.context import StageContext

RANKS = False


def run(context: StageContext) -> dict[str, Any]:
    """Write `tokenizer/`, `train/`, `held_out/` and `report.json`.

    Returns:
        Metrics: documents, tokens, blocks, dropped and held-out tokens, rejected records by reason, tokens per
        character, bytes per token, `unigram_entropy` of the held-out tokens in nats, seconds, and per source its
        documents, tokens, share and epochs. Of conversations and pairs also how many there are (`conversations` or
        `pairs`, with `held_out_` in front those set aside), `learnt_tokens`, `padding_tokens`, `padding_share` and
        `cut_conversations`, and the entropy is that of the tokens to be learnt.
    """
    stage = context.stage
    assert isinstance(stage, BuildData)
    return build(stage, context.folder, _tokenizer(context, stage))


def _tokenizer(context: StageContext, stage: BuildData) -> str | Path | TokenizerTraining:
    """How to train one, the folder of an earlier stage's, or a folder or Hub id."""
    if isinstance(stage.tokenizer, TokenizerTraining):
        return stage.tokenizer
    if any(other.name == stage.tokenizer and isinstance(other, BuildData) for other in context.recipe.stages):
        return context.data(stage.tokenizer) / "tokenizer"
    if any(other.name == stage.tokenizer for other in context.recipe.stages):
        resolved = context.model(stage.tokenizer)
        return resolved.tokenizer or resolved.folder
    return stage.tokenizer
