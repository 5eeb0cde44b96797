"""The samples of the local lm-eval tasks."""

import json
from pathlib import Path

TASKS = Path(__file__).parent.parent / "configs" / "eval"


def read_samples(name):
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def test_cloze_samples_are_sound():
    samples = read_samples("python_cloze.jsonl")
    assert len({sample["prefix"] for sample in samples}) == len(samples) >= 60
    answers = [sample["answer"] for sample in samples]
    assert [answers.count(index) for index in range(4)] == [len(samples) // 4] * 4
    for sample in samples:
        # lm-eval moves trailing blanks to the continuation, which would blur the two
        assert sample["prefix"] == sample["prefix"].rstrip(" ")
        assert len(set(sample["choices"])) == 4


def test_perplexity_samples_are_python():
    for sample in read_samples("python_perplexity.jsonl"):
        compile(sample["text"], "sample", "exec")
