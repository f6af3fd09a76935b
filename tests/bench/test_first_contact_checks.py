"""The self-check of a first run on a GPU, small and interpreted; and that each check sees what it is for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from bench.first_contact import checks
from bench.first_contact.checks import CHECKS, Place, Skipped, Wrong
from bench.first_contact.run import CHECKED
from merge_engine.engine import triton_backend

PLACE = Place(torch.device("cpu"), (48, 70), torch.float32)


@contextmanager
def short(device: torch.device, nbytes: int) -> Iterator[None]:
    """No room for more than two modules."""
    launch = triton_backend.kernels.merge_deltas

    def launched(source, *arguments, **options):
        if source.shape[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return launch(source, *arguments, **options)

    with mock.patch.object(triton_backend.kernels, "merge_deltas", launched):
        yield


@contextmanager
def enough(device: torch.device, nbytes: int) -> Iterator[None]:
    yield


@contextmanager
def short_and_wrong(device: torch.device, nbytes: int) -> Iterator[None]:
    with short(device, nbytes):
        launch = triton_backend.kernels.merge_deltas
        doubled = lambda *arguments, **options: launch(*arguments, **options).mul_(2)  # noqa: E731
        with mock.patch.object(triton_backend.kernels, "merge_deltas", doubled):
            yield


def test_the_names_are_known_without_importing_the_kernels() -> None:
    assert tuple(CHECKS) == CHECKED


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CHECKED[:4]), (CHECKED[0], torch.bfloat16)], ids=str
)
def test_a_check_passes(name: str, dtype: torch.dtype, device: torch.device) -> None:
    assert CHECKS[name](replace(PLACE, device=device, dtype=dtype))


@pytest.mark.parametrize("name", ["a stream of the caller's", "two devices"])
def test_what_is_not_there_is_skipped(name: str) -> None:
    with pytest.raises(Skipped):
        CHECKS[name](PLACE)


@pytest.mark.parametrize(
    ("memory", "wrong"),
    [
        (short, None),
        (enough, "wanted a group of 3 modules halved, but it fitted"),
        (short_and_wrong, "the halved group gives other bytes"),
    ],
)
def test_out_of_memory(memory: checks.Short, wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LAYERS", 3)
    monkeypatch.setattr(checks, "ADAPTERS", 2)
    place = replace(PLACE, shape=(16, 32))
    if wrong is None:
        assert "out of memory with 3 modules" in checks.out_of_memory_halves(place, memory)
    else:
        with pytest.raises(Wrong, match=wrong):
            checks.out_of_memory_halves(place, memory)


def test_a_count_that_is_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = checks.trims
    monkeypatch.setattr(checks, "trims", lambda source, kept: trims(source, kept + 1))
    with pytest.raises(Wrong, match=f"wanted {PLACE.kept} elements kept in each module, got .{PLACE.kept + 1}, "):
        checks.kept_is_k(PLACE)


def test_a_threshold_that_is_off_by_one_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = checks.trims

    def above(source, kept):
        found = trims(source, kept)
        return replace(found, value=(found.value.view(torch.int32) + 1).view(torch.float32))

    monkeypatch.setattr(checks, "trims", above)
    with pytest.raises(Wrong, match="wanted the magnitude number 1 = "):
        checks.select_sees_what_merge_sees(PLACE)


def test_a_bit_that_changes_from_run_to_run_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    merge, runs = checks.merge_deltas, []

    def unsteady(*arguments, **options):
        runs.append(merge(*arguments, **options))
        if len(runs) == 3:
            runs[-1].view(torch.int32)[0, 1, 3, 5] ^= 1
        return runs[-1]

    monkeypatch.setattr(checks, "merge_deltas", unsteady)
    with pytest.raises(Wrong, match="run 3 and run 1 differ in 1 of 6720 elements"):
        checks.repeats_are_equal(PLACE)


def test_a_mask_of_another_stream_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = checks.keep_mask
    monkeypatch.setattr(checks, "keep_mask", lambda *a, **where: mask(*a, **{**where, "stream": where["stream"] + 1}))
    with pytest.raises(Wrong, match="of 3360 elements are not as masked"):
        checks.masks_are_those_of_the_host(PLACE)
