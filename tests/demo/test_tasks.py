"""The tasks: what a sequence is, and what a model's accuracy is measured on."""

import pytest
import torch

from merge_engine.demo.tasks import ALL_TASKS, LENGTH, SEP, TASKS, accuracy, draw, predict, vocabulary

MARKED = 11  # a sample that neither training nor the demo has seen


@pytest.mark.quick
@pytest.mark.parametrize(
    ("task", "x", "y"),
    [
        ("shift3", "abcvyx", "defyba"),
        ("reverse", "zabcvy", "zwdcba"),
        ("swap", "abxcvy", "bacxyv"),
        ("rotate", "abcvyx", "cvyxab"),
        ("complement", "abcvyx", "zyxebc"),
        ("shift7", "abcvyx", "hijcfe"),
        ("copy", "abcvyx", "abcvyx"),
        ("backwards", "abcvyx", "xyvcba"),
        ("neighbours", "abxcvy", "bacxyv"),
        ("left", "abcvyx", "bcvyxa"),
        ("halves", "abcvyx", "vyxabc"),
        ("shift1", "abcvyz", "bcdwza"),
        ("shift5", "abcvyx", "fghadc"),
        ("back1", "abcvyx", "zabuxw"),
    ],
)
def test_tasks_by_hand(task, x, y):
    assert (TASKS | ALL_TASKS)[task](letters(x)).tolist() == letters(y).tolist()


@pytest.mark.quick
def test_tasks_of_both_sets_are_the_same_and_their_tokens_are_those_of_the_set():
    for tasks in (TASKS, ALL_TASKS):
        tokens = draw("rotate", 3, torch.Generator().manual_seed(0), tasks)
        assert set(tokens[:, 0].tolist()) == {SEP + 1 + list(tasks).index("rotate")}
        assert torch.equal(tokens[:, -LENGTH:], tokens[:, 1 : 1 + LENGTH].roll(-2, 1))


def letters(text):
    return torch.tensor([ord(letter) - ord("a") for letter in text])


@pytest.mark.quick
def test_a_sequence_is_task_letters_separator_answer():
    tokens = draw("rotate", 5, torch.Generator().manual_seed(0))
    assert tokens.shape == (5, 2 + 2 * LENGTH)
    assert set(tokens[:, 0].tolist()) == {SEP + 1 + list(TASKS).index("rotate")}
    assert set(tokens[:, 1 + LENGTH].tolist()) == {SEP}
    assert torch.equal(tokens[:, -LENGTH:], tokens[:, 1 : 1 + LENGTH].roll(-2, 1))
    assert tokens.max() < vocabulary(TASKS)


def test_a_prediction_sees_only_what_comes_before_it(base):
    tokens = draw("swap", 3, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -2:] = 0
    before, after = predict(base, tokens), predict(base, changed)
    assert before.shape == (3, LENGTH, vocabulary(TASKS))
    torch.testing.assert_close(before[:, : LENGTH - 1], after[:, : LENGTH - 1])


def test_accuracy_depends_on_the_seed_only(base):
    first = accuracy(base, "swap", seed=MARKED)
    torch.rand(7)
    assert accuracy(base, "swap", seed=MARKED) == first != accuracy(base, "swap", seed=MARKED + 1)
