from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from minima.report.benchmark_card import BenchmarkScore, split, with_benchmarks

CARD = """---
library_name: transformers
language: [zh]
---

# student

Text that a person wrote: 你好.

## Limits

None.
"""
SCORE = BenchmarkScore("mmlu", "acc", 0.2543, "lm-eval 0.4.13", stderr=0.01, shots="5", version="2", items=100)


def test_scores_come_before_the_limits_and_the_rest_stays():
    text = with_benchmarks(CARD, "student", [SCORE])
    assert "| mmlu | acc | 5 | 0.2543 | 0.0100 | 2 |" in text
    assert text.index("你好") < text.index("## Benchmark scores") < text.index("## Limits") < text.index("None.")
    assert split(text)[0]["language"] == ["zh"]
    assert "lm-eval 0.4.13" in text


def test_the_hub_reads_the_same_numbers():
    [result] = ModelCard(with_benchmarks(CARD, "student", [SCORE])).data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("mmlu", "acc", 0.2543)
    assert (result.metric_name, result.source_name) == ("acc, 5-shot, task version 2", "lm-eval 0.4.13")


def test_a_score_on_some_items_is_marked_and_no_result_for_the_hub():
    text = with_benchmarks(CARD, "student", [replace(SCORE, items=20, limited=True)])
    assert "mmlu (20 items)" in text
    assert "model-index" not in text


def test_newer_scores_replace_older_ones():
    once = with_benchmarks(CARD, "student", [SCORE])
    assert with_benchmarks(once, "student", [SCORE]) == once
    text = with_benchmarks(once, "student", [replace(SCORE, value=0.5)])
    assert text.count("## Benchmark scores") == 1
    assert "0.2543" not in text
    assert "## Limits\n\nNone." in text


def test_no_scores_change_nothing():
    assert with_benchmarks(CARD, "student", []) == CARD


def test_a_card_without_head_or_limits_gets_both_parts():
    text = with_benchmarks("# mine\n\nwords\n", "student", [SCORE])
    head, body = split(text)
    assert head["model-index"][0]["name"] == "student"
    assert body.index("words") < body.index("## Benchmark scores")


@pytest.mark.parametrize("head", ["a: [", "- a\n- b"])
def test_a_head_that_is_no_mapping_is_refused(head):
    with pytest.raises(ValueError):
        split(f"---\n{head}\n---\n\n# x\n")
