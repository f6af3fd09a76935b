"""What is read from an evaluation's output, and what is refused because it could be read in two ways."""

import json
import re

import numpy as np
import pytest
import torch

from merge_engine.errors import MergeError
from merge_engine.sweeps.readings import metrics_matched, metrics_of, metrics_printed, metrics_written

# As lm-eval 0.4 prints and writes it: a task with two metrics, one with two filters, and a group.
HARNESS_TABLE = """\
hf (pretrained=tiny), gen_kwargs: (None), limit: None, num_fewshot: None, batch_size: 1
|  Tasks  |Version|     Filter     |n-shot|  Metric   |   |Value |   |Stderr|
|---------|------:|----------------|-----:|-----------|---|-----:|---|-----:|
|mini     |      1|none            |     0|acc        |↑  |0.3750|±  |0.1830|
|         |       |none            |     0|acc_norm   |↑  |0.5000|±  |0.1890|
|gsm8k    |      3|flexible-extract|     5|exact_match|↑  |0.1000|±  |0.0100|
|         |       |strict-match    |     5|exact_match|↑  |0.0500|±  |0.0200|

|Groups|Version|Filter|n-shot|Metric|   |Value|   |Stderr|
|------|------:|------|-----:|------|---|----:|---|-----:|
|mmlu  |      2|none  |      |acc   |↑  | 0.25|±  |0.0036|
| - law|      2|none  |     0|acc   |↑  | 0.30|±  |0.0100|
"""
HARNESS_JSON = {
    "results": {
        "mini": {"alias": "mini", "acc,none": 0.375, "acc_stderr,none": 0.183, "sample_len": 8},
        "gsm8k": {"exact_match,strict-match": 0.05, "exact_match_stderr,strict-match": "N/A"},
    },
    "config": {"model": "hf", "batch_size": 1},
}

# What lm-eval 0.4.13 printed of a tiny model and a task of eight questions.
PRINTED = """\
hf ({'pretrained': 'tiny'}), gen_kwargs: ({}), limit: None, num_fewshot: None, batch_size: 1
|Tasks|Version|Filter|n-shot| Metric |   |Value|   |Stderr|
|-----|-------|------|-----:|--------|---|----:|---|-----:|
|mini |Yaml   |none  |     0|acc     |↑  |0.625|±  | 0.183|
|     |       |none  |     0|acc_norm|↑  |0.625|±  | 0.183|
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("printed", "metrics"),
    [
        ("3", {"score": 3}),
        ("layer 1\nscore: -0.25\n", {"score": -0.25}),
        ("loss=1.5e-3", {"loss": 0.0015}),
        ("epoch 3 of 5\nacc: 0.5\nf1 = 25 %", {"acc": 0.5, "f1": 25}),
        ("acc 93.5%", {"score": 93.5}),
        ("Accuracy is 93.", {"score": 93}),
        ("0.91 in layer2 of v1.5.2", {"score": 0.91}),
        ("7 layers\n\x1b[32m0.93\x1b[0m\n\n", {"score": 0.93}),
        ("1 2 3\n93.5 %", {"score": 93.5}),
        ('0.1\n{"acc": 0.5, "by task": {"sql": 1, "note": "x", "ok": true}}', {"acc": 0.5, "by task/sql": 1}),
        ('log 5\n{\n  "acc": 0.5,\n  "more": {\n  "f1": 2\n}\n}', {"acc": 0.5, "more/f1": 2}),
        (json.dumps(HARNESS_JSON), {"mini/acc": 0.375, "mini/acc_stderr": 0.183, "mini/sample_len": 8}),
    ],
)
def test_what_is_read(printed, metrics):
    found = metrics_printed(printed)
    assert {name: found[name] for name in metrics} == metrics
    assert "results" in printed or found == metrics


def test_the_table_of_the_harness_gives_values_and_never_their_errors():
    assert metrics_printed(PRINTED) == {"mini/acc": 0.625, "mini/acc_norm": 0.625}
    assert metrics_printed(HARNESS_TABLE) == {
        "mini/acc": 0.375,
        "mini/acc_norm": 0.5,
        "gsm8k/exact_match,flexible-extract": 0.1,
        "gsm8k/exact_match,strict-match": 0.05,
        "mmlu/acc": 0.25,
        "law/acc": 0.3,
    }


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("", "wanted a number on standard output, got none"),
        ("done", "wanted a number on standard output, got 'done'"),
        ("v2 3s", "wanted a number on standard output"),
        ("(0.1, .5)", "got 2 numbers that could be it: '(0.1, .5)'"),
        ("0.9\nDone in 3.2 s", "got 2 numbers that could be it: '0.9 / Done in 3.2 s'"),
        ("|mini|1|none|0|acc|↑|0.5|±|0.1|", "numbers that could be it"),
        ("loss 1,234.5", "1,234.5 may be one number or two"),
        ("score: 1,234.5", "1,234.5 may be one number or two"),
        ("1,234", "1,234 may be one number or two"),
        ("USD1,234.5", "1,234.5 may be one number or two"),
        ("USD1,234.5\ndone", "1,234.5 may be one number or two"),
        ("12,5 is it\nno number here", "got 2 numbers that could be it"),
        ("score: 0.5\n0.7", "wanted one score, got 0.5 and 0.7"),
        ('{"acc": 0.5', "looks like JSON and is not"),
        ('{"acc": 0.5,}', "looks like JSON and is not"),
        ('{"name": "x"}', "wanted a number or a table of numbers"),
    ],
)
def test_what_could_be_read_in_two_ways_or_in_none(printed, message):
    with pytest.raises(MergeError, match=f"^evaluate: .*{re.escape(message)}"):
        metrics_printed(printed)


def test_a_regular_expression_names_its_metrics():
    pattern = re.compile(r"acc on (?P<task>\w+)=(?P<acc>\S+)|loss (?P<loss>\S+)")
    with pytest.raises(MergeError, match="task: wanted a number"):
        metrics_matched(pattern, "acc on sql=0.5")
    pattern = re.compile(r"acc=(?P<acc>\S+)|loss (?P<loss>\S+)")
    assert metrics_matched(pattern, "acc=0.5% 7\nloss 3") == {"acc": 0.5, "loss": 3}
    assert np.isnan(metrics_matched(pattern, "acc=0.5\nacc=0.6")["acc"])  # an error if it is asked for
    with pytest.raises(MergeError, match=r"wanted a match of 'acc=.*got 'nothing'"):
        metrics_matched(pattern, "nothing")
    with pytest.raises(MergeError, match=r"acc: wanted a number of digits and a point, got '1,234\.5'"):
        metrics_matched(pattern, "acc=1,234.5")
    with pytest.raises(MergeError, match=r"acc: 1,234\.5 may be one number or two, got '234\.5' of it"):
        metrics_matched(re.compile(r"acc=.*?(?P<acc>[0-9.]+)$"), "acc=1,234.5")


def test_values_of_functions():
    assert metrics_of(np.float32(0.5)) == metrics_of(torch.tensor(0.5)) == {"score": 0.5}
    assert metrics_of({"a": np.int64(2), "b": {"c": torch.tensor(3.0)}, "d": True, "e": "1"}) == {"a": 2, "b/c": 3}
    for wrong in (None, True, "0.5", [0.5], {}, np.ones(2), 1j):
        with pytest.raises(MergeError, match=r"^evaluate: wanted a number or a table of numbers, got "):
            metrics_of(wrong)


def test_files_of_the_harness(tmp_path):
    folder = tmp_path / "eval" / "my__model"
    folder.mkdir(parents=True)
    (folder / "r.json").write_text(json.dumps(HARNESS_JSON))
    with pytest.raises(
        MergeError, match=r"wanted one new file of results at .*/eval \(results\*\.json in a folder\), got n"
    ):
        metrics_written(tmp_path / "eval")
    file = folder / "results_2026-01-01T00-00-00.json"
    file.write_text(json.dumps(HARNESS_JSON))
    wanted = {"mini/acc": 0.375, "mini/acc_stderr": 0.183, "mini/sample_len": 8, "gsm8k/exact_match,strict-match": 0.05}
    assert metrics_written(file) == metrics_written(tmp_path / "eval") == wanted
    with pytest.raises(MergeError, match="got only older ones"):
        metrics_written(tmp_path / "eval", since=file.stat().st_mtime + 1)
    (folder / "results_2026-01-02T00-00-00.json").write_text("{}")
    with pytest.raises(MergeError, match=r"got my__model/results_2026-01-01.*, my__model/results_2026-01-02"):
        metrics_written(tmp_path / "eval")
