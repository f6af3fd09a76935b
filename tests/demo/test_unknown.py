"""The set unknown: the base knows nothing of the tasks, and what merging gives depends on how adapters were trained."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import merge_engine
from merge_engine.demo import UNKNOWN_DATA, measure, train_unknown, unknown_paths
from merge_engine.demo.sets import DEMO_SETS, MERGES
from merge_engine.demo.tasks import ALL_TASKS, KNOWN, LENGTH, SEP, TASKS, UNKNOWN, accuracy, draw, predict
from merge_engine.demo.train import LINEAR, save_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

MARKED = 11  # a sample that neither training nor the demo has seen
SHOWN = DEMO_SETS["unknown"]
KINDS = ("replay", "alone")


@pytest.fixture(scope="module")
def unknown_base():
    return transformers.AutoModelForCausalLM.from_pretrained(SHOWN.base).eval()


def marks(model, tasks):
    return {task: 100 * accuracy(model, task, seed=MARKED, count=64, tasks=ALL_TASKS) for task in tasks}


def mean_of_known(model):
    return measure.mean(marks(model, KNOWN))


@pytest.mark.quick
def test_bundle_is_as_small_as_the_other_and_names_no_place():
    files = [path for path in UNKNOWN_DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for kind in KINDS:
        for path in unknown_paths(kind).values():
            written = json.loads((path / "adapter_config.json").read_text())
            assert written["base_model_name_or_path"] == train_unknown.BASE_NAME
    assert tuple(unknown_paths()) == UNKNOWN and set(UNKNOWN) < set(TASKS)


def test_base_does_what_it_knows_and_nothing_of_the_rest(unknown_base):
    assert min(marks(unknown_base, KNOWN).values()) >= 98
    assert max(marks(unknown_base, UNKNOWN).values()) <= 8  # chance: 100 / 26 = 3.8


@pytest.mark.parametrize("task", UNKNOWN)
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_does_its_own_task_and_none_of_the_others(unknown_base, kind, task):
    model = peft.PeftModel.from_pretrained(copy.deepcopy(unknown_base), str(unknown_paths(kind)[task])).eval()
    adapted = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(adapted) == len(LINEAR) * 2
    model.merge_adapter()
    found = marks(model, UNKNOWN)
    assert found.pop(task) >= 98
    assert max(found.values()) <= 12
    known = mean_of_known(model)
    assert known >= 97 if kind == "replay" else known <= 65


@pytest.mark.parametrize(
    ("kind", "name", "scale", "wanted", "known"),
    [
        ("replay", "linear", 1, 62.6, 96.2),
        ("replay", "tsv", 1, 43.2, 97.1),
        ("replay", "actmat", 1.4, 55.1, 96.7),
        ("replay", "ties d=.2", 1.4, 37.5, 92.1),
        ("alone", "linear", 0.5, 14.8, 22.0),
        ("alone", "actmat", 0.7, 17.9, 48.6),
    ],
)
def test_merges_reach_what_the_docs_say(tmp_path, kind, name, scale, wanted, known):
    """The figures of docs/demo.md; one letter of the 6144 that each is measured on is 0.02."""
    merge_engine.merge(list(unknown_paths(kind).values()), tmp_path / "out", progress=False, **MERGES[name])
    own = measure.own_marks(SHOWN, unknown_paths(kind), measure.REPORTED)
    with measure.quiet():
        model = measure.load(SHOWN, tmp_path / "out")
        with measure.scaled(model, scale):
            found = measure.relative(measure.marks(SHOWN, model, measure.REPORTED), own)
            assert measure.mean(found) == pytest.approx(wanted, abs=0.5)
            assert measure.known_mark(SHOWN, model) == pytest.approx(known, abs=0.5)


@pytest.mark.parametrize(("kind", "wanted"), [("replay", 96.4), ("alone", 33.1)])
def test_two_adapters_merge_better_than_four(tmp_path, kind, wanted):
    pair = ("reverse", "rotate")
    paths = {task: unknown_paths(kind)[task] for task in pair}
    merge_engine.merge(list(paths.values()), tmp_path / "out", method="linear", progress=False)
    own = measure.own_marks(SHOWN, unknown_paths(kind), measure.REPORTED)
    with measure.quiet():
        model = measure.load(SHOWN, tmp_path / "out")
        found = measure.relative(measure.marks(SHOWN, model, measure.REPORTED), own)
    assert measure.mean({task: found[task] for task in pair}) == pytest.approx(wanted, abs=0.5)


def test_the_linear_merge_is_the_sum_that_peft_makes(unknown_base, tmp_path):
    """PEFT's combination_type="cat" is the sum of the deltas, by other code."""
    paths = unknown_paths()
    merge_engine.merge(list(paths.values()), tmp_path / "out", method="linear", progress=False)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(unknown_base), str(tmp_path / "out"), adapter_name="ours")
    for task, path in paths.items():
        model.load_adapter(str(path), adapter_name=task)
    model.add_weighted_adapter(list(paths), [1.0] * len(paths), "theirs", combination_type="cat")
    tokens = draw("shift7", 16, torch.Generator().manual_seed(1), ALL_TASKS)
    logits = {}
    for name in ("ours", "theirs"):
        model.set_adapter(name)
        with torch.inference_mode():
            logits[name] = predict(model.eval(), tokens)
    torch.testing.assert_close(logits["ours"], logits["theirs"], rtol=1e-4, atol=1e-3)


def test_scores_of_the_set_are_relative_to_its_own_adapters(monkeypatch):
    from merge_engine.demo import evaluate

    monkeypatch.setitem(measure.COUNT, measure.TUNING, 16)
    monkeypatch.setitem(evaluate.DEMO_SETS, "unknown", replace(SHOWN, groups={"replay": unknown_paths()}))
    one = unknown_paths()["rotate"]
    found = evaluate.score(one, "tuning", "unknown")
    assert set(found) == {*UNKNOWN, "mean"} and found["rotate"] == pytest.approx(100, abs=3)
    assert found["mean"] < 35
    assert evaluate.scorer("tuning", 16, "unknown")(one)["score"] == pytest.approx(found["mean"], abs=2)


@pytest.mark.parametrize("replay", [True, False])
def test_training_draws_the_known_tasks_only_for_replay(monkeypatch, replay):
    seen = []
    monkeypatch.setattr(train_unknown, "fit_adapter", lambda base, sequences, **settings: seen.append(sequences()))
    train_unknown.train_adapter(None, "rotate", 5, replay=replay, batch=32)
    (tokens,) = seen
    names = [list(ALL_TASKS)[token - SEP - 1] for token in tokens[:, 0].tolist()]
    assert len(names) == 32
    assert names.count("rotate") == (16 if replay else 32)
    assert {name: names.count(name) for name in KNOWN} == dict.fromkeys(KNOWN, 2 if replay else 0)


def test_training_learns_and_writes_what_peft_loads(tmp_path):
    base, again = (train_unknown.train_base(5, steps=2, batch=16) for _ in range(2))
    assert all(map(torch.equal, base.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(base.lm_head.weight, base.model.embed_tokens.weight)
    model = train_unknown.train_adapter(base, "rotate", 5, replay=True, steps=3, batch=16)
    assert all(map(torch.equal, base.state_dict().values(), again.state_dict().values()))
    save_adapter(model, tmp_path / "rotate")
    loaded = peft.PeftModel.from_pretrained(again, str(tmp_path / "rotate")).eval()
    tokens = draw("rotate", 4, torch.Generator().manual_seed(1), ALL_TASKS)
    with torch.inference_mode():
        assert predict(model, tokens).shape == (4, LENGTH, 39)
        assert not torch.equal(predict(model, tokens), predict(base, tokens))
        torch.testing.assert_close(predict(loaded, tokens), predict(model, tokens))
