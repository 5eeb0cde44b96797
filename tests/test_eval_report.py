"""The evaluation's report: recovery by hand, JSON, the table, and rows from lm-eval's results."""

import json
import math

import pytest

from samoyeds_hf.errors import EvaluationError
from samoyeds_hf.eval_report import EvalReport, EvalRow, rows_from_results


def row(sparse=0.4, dense=0.5, higher_is_better=True):
    return EvalRow("t", "m", higher_is_better, 10, sparse, 0.1, dense, 0.1)


@pytest.mark.parametrize(
    ("sparse", "dense", "higher_is_better", "recovery"),
    [
        (0.4, 0.5, True, 80.0),
        (0.6, 0.5, True, 120.0),  # better than dense
        (0.0, 0.5, True, 0.0),
        (12.5, 10.0, False, 80.0),  # perplexity grows by a quarter
        (8.0, 10.0, False, 125.0),
        (0.4, None, True, None),  # no dense model
        (0.4, 0.5, None, None),  # no direction, as for a group of unlike tasks
        (0.4, 0.0, True, None),  # division by zero, both ways round
        (10.0, 0.0, False, None),
        (0.0, 10.0, False, None),
        (0.1, -0.2, True, None),  # a correlation: the ratio of signs says nothing
        (math.inf, 10.0, False, None),  # broken by pruning
        (math.nan, 0.5, True, None),
    ],
)
def test_recovery_is_what_is_left_of_the_dense_quality(sparse, dense, higher_is_better, recovery):
    assert row(sparse, dense, higher_is_better).recovery == (
        None if recovery is None else pytest.approx(recovery)
    )


def report(*rows, against="dense"):
    return EvalReport(
        model="out/sparse",
        pattern="1:2:32",
        dtype="bfloat16",
        against=against,
        against_dtype=against and "bfloat16",
        device="cpu",
        limit=10,
        num_fewshot=None,
        seed=None,
        versions={"torch": "2.13.0", "samoyeds_hf": "0.1.0"},
        rows=rows,
    )


def test_json_round_trip_keeps_everything():
    original = report(row(), row(sparse=math.inf, higher_is_better=False), row(dense=None))
    text = original.to_json()
    assert EvalReport.from_json(text) == original
    data = json.loads(text, parse_constant=pytest.fail)  # strict JSON knows no Infinity
    assert [entry["recovery"] for entry in data["rows"]] == [pytest.approx(80.0), None, None]
    assert data["rows"][1]["sparse"] == "inf"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"task": "t"}]}', '{"rows": 3}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(EvaluationError, match="to_json"):
        EvalReport.from_json(text)


def test_table_is_plain_aligned_text():
    table = str(report(row(), EvalRow("longer_task", "acc,strict", False, 2000, 31.25, None, 25.0)))
    assert table.splitlines() == [
        "sparse  out/sparse (1:2:32, bfloat16)",
        "dense   dense (bfloat16)",
        "",
        "task         metric      better  samples           sparse            dense  recovery",
        "-" * 84,
        "t            m           higher       10  0.4000 ± 0.1000  0.5000 ± 0.1000    80.0 %",
        "longer_task  acc,strict  lower      2000          31.2500          25.0000    80.0 %",
        "",
        "cpu, limit 10 samples a task, torch 2.13.0, samoyeds_hf 0.1.0",
    ]
    alone = str(report(row(dense=None), against=None))
    assert "recovery" not in alone
    assert "dense" not in alone


def test_rows_are_the_numbers_of_both_results():
    def results(acc, strict):
        return {
            "results": {
                "t": {
                    "name": "t",
                    "alias": "T",
                    "sample_len": 7,
                    "acc,none": acc,
                    "acc_stderr,none": 0.1,
                    "exact_match,strict": strict,
                    "exact_match_stderr,strict": "N/A",
                },
                "group": {"name": "group", "alias": "a group without a metric of its own"},
            },
            "higher_is_better": {"t": {"acc": True, "exact_match": True}},
        }

    assert rows_from_results(results(0.25, 0.5), results(0.5, 1.0)) == (
        EvalRow("t", "acc", True, 7, 0.25, 0.1, 0.5, 0.1),
        EvalRow("t", "exact_match,strict", True, 7, 0.5, None, 1.0, None),
    )
    assert [(r.dense, r.recovery) for r in rows_from_results(results(0.25, 0.5))] == [
        (None, None),
        (None, None),
    ]
