"""Names of merges, and what no name may hold."""

import pytest

from merge_engine.errors import RecipeError
from merge_engine.serve.names import parse_name, wanted_of


@pytest.mark.quick
def test_a_name_is_a_merge():
    wanted = parse_name("merge:sql*2+chat-v1.2@ties,density=0.2")
    assert wanted.adapters == ("sql", "chat-v1.2")
    assert wanted.fields() == {"method": "ties", "density": 0.2, "weights": [2, 1]}
    assert parse_name("merge:sql").fields() == {"weights": [1]}
    assert parse_name("merge:a+b@tsv,scale=auto,gain=1.5,rank=16").fields() == {
        **{"method": "tsv", "scale": "auto", "gain": 1.5, "rank": 16},
        "weights": [1, 1],
    }


def test_equal_requests_have_equal_names():
    one = parse_name("merge:a*2.0+b@ties,scale=1,density=.5")
    other = wanted_of(["a", "b"], [2, 1], {"density": 0.5, "method": "ties", "scale": 1})
    assert one == other and one.name == other.name and parse_name(one.name) == one


HOSTILE = [
    "sql+chat",
    "merge:",
    "merge:../secret",
    "merge:..",
    "merge:/etc/passwd",
    "merge:user/repo",
    "merge:a\\b",
    "merge:.hidden",
    "merge:a\x00b",
    "merge:a\n",
    "merge:a+",
    "merge:a+a",
    "merge:a*1e999",
    "merge:a*nan",
    "merge:a*1000000",
    "merge:a*-1000000",
    "merge:a*0x10",
    "merge:a*1_0",
    "merge:a@../../x",
    "merge:a@ties,density=2",
    "merge:a@ties,density",
    "merge:a@ties,density=0.1,density=0.2",
    "merge:a@ties,rank=99999999999",
    "merge:a@ties,rank=1.5",
    "merge:a@ties,dtype=float64",
    "merge:a@ties,module_weights={}",
    "merge:a@__import__",
    "merge:" + "+".join(f"a{n}" for n in range(1_000_000)),
    "merge:" + "+".join(f"a{n}" for n in range(17)),
    "merge:" + "a" * 65,
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:30]))
def test_what_no_name_may_hold(name):
    with pytest.raises(RecipeError) as raised:
        parse_name(name)
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "parts",
    [
        (None, None, {}),
        ("ab", None, {}),
        ([], None, {}),
        ([1], None, {}),
        (["a"], [True], {}),
        (["a"], [1, 2], {}),
        (["a"], "1", {}),
        (["a"], [float("inf")], {}),
        (["a"], None, {"density": [0.1]}),
        (["a"], None, {"method": ["ties"]}),
        (["a"], None, {"into": "base"}),
    ],
)
def test_what_no_request_may_hold(parts):
    with pytest.raises(RecipeError):
        wanted_of(*parts)
