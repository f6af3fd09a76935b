"""The drop-in as PEFT's users meet it: its arguments, patching, and what an error leaves."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from peft_zoo import STOCK, Spec, Zoo, assert_same_factors, both, build, factors, product
from unchanged import assert_unchanged, snapshot

import merge_engine
from merge_engine.errors import AdapterError, MergeError, RecipeError
from merge_engine.peft_backend import add_weighted_adapter, disable, enable, enabled

CALL = {"combination_type": "ties", "density": 0.5}


@pytest.mark.quick
def test_the_result_is_not_active_not_trainable_and_the_rest_is_as_it_was():
    """Stock freezes "alpha" too if the merge is named "a"."""
    spec = Spec(call=CALL)
    model = build(spec)
    before = snapshot(model)
    add_weighted_adapter(model, spec.names, spec.weights, "adapter", **CALL)
    assert not any(p.requires_grad for pair in factors(model, "adapter").values() for p in pair)
    model.delete_adapter("adapter")
    assert_unchanged(model, before)


def test_every_refusal_is_a_value_error():
    assert issubclass(MergeError, ValueError) and issubclass(AdapterError, MergeError)
    assert issubclass(RecipeError, MergeError)


def test_an_existing_name_is_left_alone():
    spec = Spec(call=CALL)
    model = build(spec)
    before = snapshot(model)
    assert add_weighted_adapter(model, ["nobody"], [], "adapter1") is None
    assert_unchanged(model, before)


def test_one_adapter_is_linear_whatever_is_asked():
    spec = Spec(configs=({},), weights=(0.7,), call={"combination_type": "ties_svd", "density": 0.1, "svd_rank": 1})
    assert_same_factors(both(spec))


def test_other_tuners_are_stocks_business():
    config = AdaLoraConfig(target_modules=["one"], total_step=10)
    model = get_peft_model(Zoo("linear"), config, "sql")
    for add in (model.add_weighted_adapter, lambda *rest: add_weighted_adapter(model, *rest)):
        with enabled(), pytest.raises(TypeError, match="AdaLoraModel does not support"):
            add(["sql"], [1.0], "merged")


def test_enabling_and_disabling_twice_leaves_peft_as_it_was():
    for _ in range(2):
        enable()
    assert LoraModel.add_weighted_adapter is add_weighted_adapter
    with enabled():
        pass
    assert LoraModel.add_weighted_adapter is add_weighted_adapter
    for _ in range(2):
        disable()
    assert LoraModel.add_weighted_adapter is STOCK


def test_an_exception_inside_the_block_leaves_peft_as_it_was():
    with pytest.raises(KeyError), enabled():
        raise KeyError
    assert LoraModel.add_weighted_adapter is STOCK


def test_blocks_overlap_between_threads():
    inside, leave, seen = threading.Barrier(3), threading.Event(), []

    def early():
        with enabled():
            inside.wait()

    def late():
        with enabled():
            inside.wait()
            leave.wait()
            seen.append(LoraModel.add_weighted_adapter)

    threads = [threading.Thread(target=early), threading.Thread(target=late)]
    for thread in threads:
        thread.start()
    inside.wait()
    threads[0].join()
    leave.set()
    threads[1].join()
    assert seen == [add_weighted_adapter]
    assert LoraModel.add_weighted_adapter is STOCK


def test_two_models_merge_at_once():
    specs = [Spec(kind=kind, call={"combination_type": "ties_svd", "density": 0.5}) for kind in ("linear", "conv2d")]
    alone = [both(spec, svd="exact") for spec in specs]
    models = [build(spec) for spec in specs]
    with enabled():
        threads = [
            threading.Thread(
                target=model.add_weighted_adapter,
                args=(spec.names, spec.weights, "ours"),
                kwargs={**spec.call, "svd": "exact"},
            )
            for spec, model in zip(specs, models, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for model, want in zip(models, alone, strict=True):
        for name, (A, B) in factors(want, "ours").items():
            torch.testing.assert_close(product(*factors(model, "ours")[name]), product(A, B))


def test_it_imports_without_peft():
    script = "import sys; sys.modules['peft'] = None; import merge_engine.peft_backend"
    root = Path(merge_engine.__file__).parent.parent
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
