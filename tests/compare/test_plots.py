"""The lines of a comparison's plots."""

import math

import pytest


@pytest.mark.quick
def test_modules_by_kind_and_layer():
    pytest.importorskip("matplotlib")
    from merge_engine.compare.plots import by_layer, lines_by_kind

    assert by_layer(["h.0.attn.q", "h.1.attn.q", "h.1.mlp.q", "h.0.experts.3.w", "h.0.experts.12.w", "lm_head"]) == {
        "attn.q": {0: ["h.0.attn.q"], 1: ["h.1.attn.q"]},
        "mlp.q": {1: ["h.1.mlp.q"]},
        "experts.w": {0: ["h.0.experts.3.w", "h.0.experts.12.w"]},
    }
    assert by_layer(["text.layers.4.q", "vision.layers.4.q"]) == {
        "text.layers.q": {4: ["text.layers.4.q"]},
        "vision.layers.q": {4: ["vision.layers.4.q"]},
    }
    assert by_layer(["lm_head"]) == {}
    kinds = {"q": {0: ["a"], 1: ["b", "c"]}, "v": {0: ["d"]}}
    values = {"a": 1.0, "b": 2.0, "c": 4.0, "d": math.nan}
    assert lines_by_kind(kinds, lambda names: sum(values[name] for name in names)) == {"q": {0: 1.0, 1: 6.0}}
