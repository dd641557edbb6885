"""The model card of an exported folder: what the model is, how it was made, what it scores. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from minima.report.tables import markdown_table

# Identifiers that the Hub takes as they are; any other is shown as `other` with its name, which is always valid.
HUB_LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"}
HUB_LICENCES |= {"cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "unlicense"}
HUB_LICENCES |= {"llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"}
SCORES = ("loss", "perplexity", "bits_per_byte", "kl", "top1_agreement")


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        name: of the model.
        recipe: name of the recipe that made it.
        family: `model_type` of its configuration.
        parameters: of the model; a tied head counts once.
        dtype: of the written weights.
        shape: what the model is made of: a label and a count each.
        stages: the stages it came through, the first one first: name, kind and their settings.
        data: one line for each source of text.
        tokens: text tokens that the last training stage trained on; none when nothing was trained.
        scores: held-out scores by model, as the evaluate stage measured them.
        max_positions: longest sequence, in tokens.
        licence: identifier; none when it was not given.
        chat_template: whether the tokenizer has one.
        checked: what was compared before the folder was published, one line each.
    """

    name: str
    recipe: str
    family: str
    parameters: int
    dtype: str
    shape: Mapping[str, int]
    stages: Sequence[tuple[str, str, Mapping[str, Any]]]
    data: Sequence[str]
    tokens: int | None
    scores: Mapping[str, Mapping[str, Any]]
    max_positions: int
    licence: str | None = None
    chat_template: bool = False
    checked: Sequence[str] = field(default_factory=tuple)


def model_card(card: Card) -> str:
    """The card in Markdown, with the front matter that the Hub reads."""
    sections = [
        _front_matter(card),
        f"# {card.name}\n\n{_summary(card)}",
        f"## Use\n\n{_use(card)}",
        f"## Shape\n\n{markdown_table(list(card.shape.items()), ('part', 'count'))}",
        f"## How it was made\n\n{_stages(card)}",
        "## Data\n\n" + ("\n".join(f"- {line}" for line in card.data) or "Not recorded."),
    ]
    if card.scores:
        sections.append(f"## Held-out scores\n\n{_scores(card)}")
    if card.checked:
        sections.append("## Checked before it was published\n\n" + "\n".join(f"- {line}" for line in card.checked))
    sections.append(f"## Limits\n\n{_limits(card)}")
    sections.append(f"## Licence\n\n{card.licence or 'None was stated. Ask whoever published this folder.'}")
    return "\n\n".join(sections) + "\n"


def _front_matter(card: Card) -> str:
    tags = ["minima", *(kind for kind in ("prune", "distil") if any(stage[1] == kind for stage in card.stages))]
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if card.licence in HUB_LICENCES:
        fields["license"] = card.licence
    elif card.licence:
        fields |= {"license": "other", "license_name": card.licence}
    return "---\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) + "---"


def _summary(card: Card) -> str:
    kinds = [kind for _, kind, _ in card.stages]
    last = {"distil": "distilled", "adapt": "trained"}.get(kinds[-1] if kinds else "")
    how = " and ".join((["pruned"] if "prune" in kinds else []) + ([last] if last else [])) or "exported"
    tokens = f", over {card.tokens:,} tokens of text in its last stage" if card.tokens else ""
    return (
        f"A {card.family} causal language model with {card.parameters:,} parameters in {card.dtype}, {how} with "
        f"minima{tokens}."
    )


def _use(card: Card) -> str:
    prompt = (
        'messages = [{"role": "user", "content": "What is a language model?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")"
        if card.chat_template
        else 'inputs = tokenizer("The state of the union is", return_tensors="pt")'
    )
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the Hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        f"{prompt}\n"
        "output = model.generate(**inputs, max_new_tokens=40)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
        "```\n\n"
        "It loads in transformers 5 and in the last 4.x, with no code of its own."
    )


def _stages(card: Card) -> str:
    blocks = []
    for name, kind, settings in card.stages:
        lines = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
        blocks.append(f"**{name}** ({kind})\n\n```yaml\n{lines}```")
    return "\n\n".join([f"By the recipe `{card.recipe}`, stage by stage:", *blocks])


def _scores(card: Card) -> str:
    columns = [column for column in SCORES if any(column in scores for scores in card.scores.values())]
    rows = [(name, *(scores.get(column) for column in columns)) for name, scores in card.scores.items()]
    return (
        markdown_table(rows, ("model", *columns))
        + "\n\nLoss in nats per token of held-out text; `kl` (nats per token) "
        "and `top1_agreement` are against the teacher."
    )


def _limits(card: Card) -> str:
    return (
        f"It was made for sequences of at most {card.max_positions:,} tokens, and knows no more than its data and the "
        "models it came from. It can be wrong, and it can repeat what is harmful in them; nothing was done here to "
        "prevent that. Scores above are on text of the same origin as its training text, so they say little about "
        "other text."
    )
