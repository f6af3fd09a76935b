"""Drawn configurations end as in stock PEFT, or in a row of the table of what PEFT gets wrong.

`python tests/helpers/peft_fuzz.py 2000` runs more of them.
"""

from collections import Counter

import pytest
from peft_fuzz import run
from peft_zoo import has_doubled_svd_scaling

from merge_engine.peft_backend import factors


@pytest.mark.skipif(has_doubled_svd_scaling(), reason="svd types of this PEFT are wrong")
def test_drawn_configurations():
    words = Counter(run(number) for number in range(80))
    assert words["agree"] >= 40 and words["both refuse"] >= 5
    assert len(words) >= 5  # what stock gets wrong is among them


def test_a_wrong_weight_is_noticed(monkeypatch):
    right = factors.strengths
    monkeypatch.setattr(factors, "strengths", lambda *arguments: tuple(0.9 * x for x in right(*arguments)))
    with pytest.raises(AssertionError):
        for number in range(20):
            run(number)
