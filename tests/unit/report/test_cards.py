import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from minima.report.cards import Card, code_span, model_card

CARD = Card(
    name="student",
    recipe="small",
    family="llama",
    parameters=54038400,
    dtype="bfloat16",
    shape={"width": 384, "layers": 26},
    stages=[("cut", "prune", {"score": "gradient"}), ("student", "distil", {"steps": 200, "teacher": "teacher"})],
    training={"student": {"steps": 200, "tokens": 409600, "held_out_loss": 4.1}},
    data=["`sotu` (stage `corpus`)"],
    scores={"teacher": {"loss": 3.0, "perplexity": 20.0}, "student": {"loss": 4.0, "perplexity": 54.0, "kl": 1.0}},
    max_positions=8192,
    licence="apache-2.0",
    checked=["every tensor"],
)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_is_what_the_hub_reads():
    text = model_card(CARD)
    assert text.startswith("---\n")
    assert ModelCard(text).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minima", "prune", "distil"],
        "license": "apache-2.0",
    }


def test_a_licence_that_the_hub_does_not_know_keeps_its_name():
    fields = front_matter(model_card(replace(CARD, licence="Our Own 1.0: research")))
    assert (fields["license"], fields["license_name"]) == ("other", "Our Own 1.0: research")
    assert "license" not in front_matter(model_card(replace(CARD, licence=None)))


def test_the_card_tells_recipe_data_tokens_and_scores():
    assert "the recipe `small`" in model_card(CARD)
    text = model_card(CARD)
    for fact in ("54,038,400 parameters in bfloat16, pruned and distilled", "409,600 tokens", "sotu", "8,192 tokens"):
        assert fact in text
    assert "| student | 4.0000 | 54.0000 | 1.0000 |" in text
    assert "| teacher | 3.0000 | 20.0000 | - |" in text
    assert "steps: 200" in text


def test_missing_facts_leave_no_empty_section():
    text = model_card(replace(CARD, training={}, scores={}, checked=[], stages=[], data=[]))
    assert "Held-out scores" not in text
    assert "None" not in text
    assert not re.search(r"##[^\n]*\n\n(##|$)", text)


@pytest.mark.parametrize("chat", [True, False])
def test_the_example_is_python(chat):
    text = model_card(replace(CARD, chat=chat, chat_template=chat))
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert ("pipeline(" in code) is chat
    assert ("minima chat" in text) is chat


def test_a_template_alone_makes_no_chat_model():
    text = model_card(replace(CARD, chat_template=True))
    assert "llama causal language model" in text
    assert "pipeline(" not in text
    assert "no stage trained it to answer" in text
    assert "chat template" in text
    assert "chat template" not in model_card(CARD)


def test_what_the_model_came_from_is_in_the_front_matter():
    card = replace(CARD, languages=["en", "zh"], datasets=["org/data"], base_model="org/model")
    fields = ModelCard(model_card(card)).data
    assert (fields.language, fields.datasets, fields.base_model) == (["en", "zh"], ["org/data"], "org/model")
    assert fields.base_model_relation == "finetune"
    assert not {"language", "datasets", "base_model", "base_model_relation"} & set(front_matter(model_card(CARD)))


def test_a_chat_model_tells_how_it_was_tuned():
    stages = [*CARD.stages, ("tuned", "instruct", {}), ("aligned", "align", {})]
    training = {
        **CARD.training,
        "tuned": {"steps": 30, "tokens": 1000, "held_out_loss": 2.0},
        "aligned": {"steps": 9, "tokens": 500, "held_out_loss": 0.5, "held_out_accuracy": 0.75, "held_out_margin": 0.1},
    }
    text = model_card(replace(CARD, stages=stages, training=training, chat=True, chat_template=True))
    assert "llama chat model" in text
    assert "pruned, distilled, tuned on conversations and aligned with preferences" in text
    assert "over 411,100 tokens in 3 training stages" in text
    assert "| aligned | 9 | 500 | 0.5000 | 0.7500 | 0.1000 |" in text
    assert "| student | 200 | 409,600 | 4.1000 | - | - |" in text
    assert front_matter(text)["tags"] == ["minima", "prune", "distil", "instruct", "align"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_tokenizer_that_would_be_misread_is_loaded_by_its_class(chat):
    card = replace(CARD, chat=chat, chat_template=chat)
    assert "PreTrainedTokenizerFast" not in model_card(card)
    text = model_card(replace(card, misread_as="Qwen2Tokenizer"))
    code = text.split("```python\n")[1].split("```")[0]
    assert "PreTrainedTokenizerFast.from_pretrained(" in code and "AutoTokenizer" not in code
    compile(code, "card", "exec")
    assert "`AutoTokenizer` uses `Qwen2Tokenizer`" in text


def test_text_from_a_recipe_cannot_add_a_section():
    text = "a\n```\n## Added\n| x"
    stages = [("corpus", "build_data", {"sources": [{"path": text}, {"field": "````"}]})]
    card = model_card(replace(CARD, stages=stages, data=[code_span(text)], licence=text, scores={text: {"loss": 1.0}}))
    assert "\n`````yaml\nsources:" in card and "\n`````\n\n## Data\n\n- `a ''' ## Added | x`\n" in card
    assert "| a ``` ## Added \\| x | 1.0000 |" in card and card.endswith("## Licence\n\na ``` ## Added | x\n")
