"""One thread for the demo's small layers, and the accuracy of its adapters, measured once."""

from functools import cache

import pytest
import torch

from merge_engine.demo.sets import DEMO_SETS


@pytest.fixture(scope="session", autouse=True)
def measured_once():
    """What each task's own adapter reaches is the same for every test."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from merge_engine.demo import measure

    plain = measure.own_marks

    @cache
    def of_paths(base, paths, seed, count):
        shown = next(shown for shown in DEMO_SETS.values() if shown.base == base)
        return plain(shown, dict(paths), seed, count)

    def own_marks(shown, group, seed, count=None):
        return of_paths(shown.base, tuple(group.items()), seed, count or measure.COUNT[seed])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "own_marks", own_marks)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small are slower on two threads where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base():
    transformers = pytest.importorskip("transformers")
    from merge_engine.demo import BASE

    return transformers.AutoModelForCausalLM.from_pretrained(BASE).eval()
