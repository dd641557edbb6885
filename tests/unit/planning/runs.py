"""Recipes of the plan's tests."""

RUNS = {"7B to 3B": ("recipes/minima-3b.yaml", 16), "70B to 27B": ("tests/data/llama-70b-27b.yaml", 1024)}
SMALL = {"vocabulary_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}


def stages(**changes) -> list[dict]:
    corpus = {"name": "c", "kind": "build_data", "sources": [{"embedded": "sotu"}], "tokenizer": "tok",
              "sequence_length": 128, "tokens": 1_280_000}  # fmt: skip
    student = {
        "name": "s",
        "kind": "distil",
        "model": {"random": SMALL},
        "teacher": {"random": SMALL},
        "data": "c",
        "learning_rate": 1e-3,
        "batch_sequences": 64,
        "micro_batch_sequences": 4,
        "epochs": 2,
    } | changes
    return [corpus, student]  # fmt: skip
