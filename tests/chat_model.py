"""A chat model that has learnt two conversations by heart, Chinese included, in about two seconds."""

from pathlib import Path

import torch

from minima.data.chats.template_choice import set_template
from minima.data.piece_training import train_sentencepiece
from minima.data.tokenizer import load_tokenizer, write_tokenizer
from minima.models.causal_lm import load_plain
from minima.models.shape import ModelShape
from minima.models.weights import RandomSource, write_folder

WINDOW = 96
QUESTION, ANSWER = "who are you", "a small model"
ASKED_ZH, ANSWERED_ZH = "ni hao", "你好 😀 ok"  # the tokenizer knows no Chinese: three bytes, three tokens a character
_STEPS = 120


def write_chat_model(folder: Path, *, template: bool = True) -> None:
    """Train a model of two layers and write it with its tokenizer, as a folder in Hugging Face's layout."""
    texts = [QUESTION, ANSWER, ASKED_ZH, "ok user assistant"] * 5
    write_tokenizer(train_sentencepiece(texts, 290), folder)
    tokenizer = load_tokenizer(folder)
    set_template(tokenizer, "minichat")
    shape = ModelShape(
        vocabulary_size=320, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, max_positions=WINDOW
    )
    config = shape.to_config() | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    model = load_plain(RandomSource(config | {"initializer_range": 0.1}, 1)).train()
    rows = [
        torch.tensor([_ids(tokenizer, question, answer)])
        for question, answer in ((QUESTION, ANSWER), (ASKED_ZH, ANSWERED_ZH))
    ]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(_STEPS):
        row = rows[step % len(rows)]
        model(input_ids=row, labels=row).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    trained = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_folder(folder, config, trained.items(), dtype=torch.float32)
    if template:
        tokenizer.save_pretrained(folder)


def _ids(tokenizer, question: str, answer: str) -> list[int]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
