"""The model card of an exported folder: what the model is, how it was made, what it scores. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from minima.report.tables import markdown_table

# Identifiers that the Hub accepts; any other is written as `other` with a name, which is always valid.
HUB_LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"}
HUB_LICENCES |= {"cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "unlicense"}
HUB_LICENCES |= {"llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"}
SCORES = ("loss", "perplexity", "bits_per_byte", "kl", "top1_agreement")
TRAINING = ("steps", "tokens", "held_out_loss", "held_out_accuracy", "held_out_margin")
_DONE = {
    "adapt": "trained",
    "expand_vocabulary": "given a larger vocabulary",
    "prune": "pruned",
    "distil": "distilled",
    "instruct": "tuned on conversations",
    "align": "aligned with preferences",
}
_PLAIN = "PreTrainedTokenizerFast"


@dataclass(frozen=True)
class Card:
    """The content of a model card."""

    name: str  # of the model
    recipe: str
    family: str  # `model_type` of its configuration
    parameters: int  # number of parameters; a tied head counts once
    dtype: str  # of the written weights
    shape: Mapping[str, int]  # the model's parts: a label and a count each
    stages: Sequence[tuple[str, str, Mapping[str, Any]]]  # the stages that made it, in order: name, kind and settings
    training: Mapping[str, Mapping[str, Any]]  # metrics of the training stages among them, by name; see `TRAINING`
    data: Sequence[str]  # one line for each source of text
    scores: Mapping[str, Mapping[str, Any]]  # held-out scores by model, as the evaluate stage measured them
    max_positions: int  # longest sequence, in tokens
    licence: str | None = None  # identifier; None if not given
    languages: Sequence[str] = ()  # ISO 639 codes
    datasets: Sequence[str] = ()  # Hub ids
    base_model: str | None = None  # Hub id of the model that its weights are derived from; None if there is none
    chat: bool = False  # whether it was trained on conversations
    chat_template: bool = False  # whether the tokenizer has one; a base model may have inherited it
    # the class as which `AutoTokenizer` wrongly loads its tokenizer; None if it loads it correctly
    misread_as: str | None = None
    # what was compared before the folder was published, one line each
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
    if card.training:
        sections.append(f"## Training\n\n{_training(card)}")
    if card.scores:
        sections.append(f"## Held-out scores\n\n{_scores(card)}")
    if card.checked:
        sections.append("## Checked before it was published\n\n" + "\n".join(f"- {line}" for line in card.checked))
    sections.append(f"## Limits\n\n{_limits(card)}")
    licence = " ".join((card.licence or "None was stated. Ask the publisher of this folder.").split())
    sections.append(f"## Licence\n\n{licence}")
    return "\n\n".join(sections) + "\n"


def _front_matter(card: Card) -> str:
    kinds = dict.fromkeys(kind for _, kind, _ in card.stages)
    tags = ["minima", *(kind for kind in kinds if kind in _DONE and kind != "adapt")]
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if card.licence in HUB_LICENCES:
        fields["license"] = card.licence
    elif card.licence:
        fields |= {"license": "other", "license_name": card.licence}
    fields |= {"language": list(card.languages)} if card.languages else {}
    fields |= {"datasets": list(card.datasets)} if card.datasets else {}
    if card.base_model:
        # The Hub knows adapter, merge, quantized and finetune; the last fits pruned and distilled weights best.
        fields |= {"base_model": card.base_model, "base_model_relation": "finetune"}
    return front_matter(fields)


def code_span(text: str) -> str:
    """A text as it is, on one line: a path may have `*` and `_`, which Markdown would read as emphasis."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def front_matter(fields: Mapping[str, Any]) -> str:
    """The YAML block at the top of a card, which the Hub reads."""
    return "---\n" + yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True) + "---"


def _summary(card: Card) -> str:
    done = list(dict.fromkeys(_DONE[kind] for _, kind, _ in card.stages if kind in _DONE)) or ["exported"]
    how = " and ".join([text for text in (", ".join(done[:-1]), done[-1]) if text])
    tokens = sum(row.get("tokens") or 0 for row in card.training.values())
    trained = f", over {tokens:,} tokens in {len(card.training)} training stage" if tokens else ""
    trained += "s" if tokens and len(card.training) > 1 else ""
    kind = "chat model" if card.chat else "causal language model"
    return f"A {card.family} {kind} with {card.parameters:,} parameters in {card.dtype}, {how} with minima{trained}."


def _use(card: Card) -> str:
    chat = card.chat and card.chat_template
    code = (
        (
            "from transformers import pipeline\n\n"
            'chat = pipeline("text-generation", model=".")  # this folder, or its name on the Hub\n'
            'messages = [{"role": "user", "content": "What is a language model?"}]\n'
            'answer = chat(messages, max_new_tokens=256)[0]["generated_text"][-1]\n'
            'print(answer["content"])\n'
            'messages += [answer, {"role": "user", "content": "And a small one?"}]  # and so on\n'
        )
        if chat
        else (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'folder = "."  # this folder, or its name on the Hub\n'
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            'inputs = tokenizer("The state of the union is", return_tensors="pt")\n'
            "output = model.generate(**inputs, max_new_tokens=40)\n"
            "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
        )
    )
    ends = (
        " An answer ends at the tokens named in `generation_config.json`. To chat with it in a terminal, run "
        "`minima chat .`."
        if chat
        else " It continues a text; it was not trained to answer."
    )
    if card.chat_template and not chat:
        ends = (
            " It continues a text; no stage trained it to answer. Its tokenizer still has the chat template of the "
            "model that it was made from, which `minima chat .` uses."
        )
    if card.misread_as is not None:
        code = code.replace("AutoTokenizer", _PLAIN).replace(
            "from transformers import pipeline\n", f"from transformers import {_PLAIN}, pipeline\n"
        )
        code = code.replace('model=".")', f'model=".", tokenizer={_PLAIN}.from_pretrained("."))')
        ends += (
            f" Load its tokenizer with `{_PLAIN}`: for this family `AutoTokenizer` uses `{card.misread_as}`, which "
            "would feed it other tokens than it was trained on."
        )
    return f"```python\n{code}```\n\nIt loads in transformers 5 and the last 4.x without custom code.{ends}"


def _stages(card: Card) -> str:
    blocks = []
    for name, kind, settings in card.stages:
        lines = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))  # a setting must not close it
        blocks.append(f"**{name}** ({kind})\n\n{fence}yaml\n{lines}{fence}")
    return "\n\n".join([f"With the recipe `{card.recipe}`, stage by stage:", *blocks])


def _training(card: Card) -> str:
    text = "Tokens are counted in whole blocks. Losses are on held-out data, in nats per token"
    preferences = any("held_out_accuracy" in row for row in card.training.values())
    if any(kind == "instruct" for _, kind, _ in card.stages):
        text += ", in `instruct` only over the assistant's text"
    if preferences:
        text += (
            ", in `align` in nats per pair of answers; accuracy is the fraction of pairs whose better answer has the "
            "higher reward, and margin the mean difference of the two rewards"
        )
    return f"{_table(card.training, TRAINING, 'stage')}\n\n{text}."


def _scores(card: Card) -> str:
    return (
        _table(card.scores, SCORES, "model") + "\n\nLoss in nats per token of held-out text; `kl` (nats per token) "
        "and `top1_agreement` are against the teacher."
    )


def _table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], first: str) -> str:
    """One row for each name, with the columns that at least one of them has."""
    shown = [column for column in columns if any(column in row for row in rows.values())]
    return markdown_table(
        [(name, *(row.get(column) for column in shown)) for name, row in rows.items()], (first, *shown)
    )


def _limits(card: Card) -> str:
    text = (
        f"It is made for sequences of at most {card.max_positions:,} tokens, and knows no more than its data and the "
        "models it was made from. It can be wrong, and it can repeat harmful content from them; nothing was done to "
        "prevent that."
    )
    if card.scores or card.training:
        text += " The losses above are on text from the same sources as its training text, so they say little about"
        text += " other text."
    return text
