"""A small model with a tokenizer, and small benchmarks for lm-eval to ask it."""

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NO_DATE = {"day": "", "month": "", "year": ""}
QUESTIONS = ("What does the {} see", "Whom does the {} hear", "What would the {} like")
ANIMALS = ("cat", "dog", "bird", "fish", "horse", "cow")
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def items(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = [f"the {word} {draw.choice(('there', 'at home', 'here'))}" for word in draw.sample(ANIMALS, 4)]
        asked = draw.choice(QUESTIONS).format(draw.choice(ANIMALS))
        rows.append({"question": asked, "choices": choices, "answer": draw.randrange(4)})
    return rows


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path) -> None:
    """A random Llama whose choices differ, and a byte-level tokenizer trained on the questions."""
    text = [f"{row['question']}? {' '.join(row['choices'])}" for row in items(200, 9)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=4096, initializer_range=0.3,
                         eos_token_id=0, bos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[0] *= 4  # the end token is likely soon: a thousand random ones cost seconds
    model.save_pretrained(folder)


def write_tasks(folder: Path) -> None:
    rows = {"test": items(20, 1), "dev": items(4, 2)}
    for split, content in rows.items():
        write_lines(folder / f"{split}.jsonl", content)
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in rows},
            "cache_dir": str(folder / ".cache"),
        },
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}?",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 7.0},
    }
    (folder / "choice.yaml").write_text(yaml.safe_dump(task))


def write_hub_drop(folder: Path, task_files: Path) -> None:
    """The task that reads DROP from the Hub, given records in the Hub's form from this machine."""
    splits = {"train": range(4), "validation": range(4, 6)}
    for split, numbers in splits.items():
        rows = [
            {
                "query_id": str(number),
                "passage": f"It rained {number} days.",
                "question": f"How long? ({number})",
                "answer": {"number": f"{number}.5", "date": NO_DATE, "spans": []},
                "validated_answers": {"number": [""], "date": [NO_DATE], "spans": [["a", "few days"]]},
            }
            for number in numbers
        ]
        write_lines(folder / f"drop_{split}.jsonl", rows)
    files = {split: str(folder / f"drop_{split}.jsonl") for split in splits}
    kwargs = {"data_files": files, "cache_dir": str(folder / ".cache")}
    task = {"include": str(task_files / "minima_drop.yaml"), "task": "hub_drop", "dataset_path": "json"}
    (folder / "hub_drop.yaml").write_text(yaml.safe_dump(task | {"dataset_kwargs": kwargs}))


def write_data(folder: Path) -> None:
    """Five different items and the examples of each benchmark, in the form that tools/fetch_benchmarks.py writes."""
    for subject, seed in (("anatomy", 5), ("astronomy", 6)):
        rows = items(10, seed)
        for number, row in enumerate(rows):
            row |= {"question": f"{number}. {row['question']}?", "subject": subject}
        write_lines(folder / "mmlu" / subject / "test.jsonl", rows[:5])
        write_lines(folder / "mmlu" / subject / "dev.jsonl", rows[5:])
    drop = {"passage": "It rained.", "answers": [["rain", "water"], ["it"]]}
    for split, asked in (("test", ["What?", "Where?", "When?", "Why?", "How?"]), ("shots", ["0?", "1?", "2?", "3?"])):
        rows = [drop | {"query_id": str(number), "question": question} for number, question in enumerate(asked)]
        write_lines(folder / "drop" / f"{split}.jsonl", rows)
    sums = [{"question": f"{number} + 1?", "answer": f"{number + 1}\n#### {number + 1}"} for number in range(1, 6)]
    write_lines(folder / "gsm8k" / "test.jsonl", sums)
    check = "def check(f):\n    assert f() == {}"
    programs = [{"prompt": f"def f{number}():\n", "test": check.format(number)} for number in range(2)]
    # These pass whatever is said: it stands in a string that the test closes.
    said = 'def f{0}():\n    return {0}\n\n\nsaid = r"""'
    programs += [{"prompt": said.format(number), "test": f'"""\n{check.format(number)}'} for number in range(2, 5)]
    rows = [row | {"task_id": str(number), "entry_point": f"f{number}"} for number, row in enumerate(programs)]
    write_lines(folder / "humaneval" / "test.jsonl", rows)
