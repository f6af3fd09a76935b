"""A first run on a GPU: its order, its time, what it records; with steps that need no GPU."""

import json
import sys
import time
from pathlib import Path

import pytest
from pretended_gpus import pretend_gpus

from bench import report
from bench.first_contact import part
from bench.first_contact import run as first
from bench.first_contact.run import BUDGET, CHECKED, TIMING, first_contact, steps_of
from bench.first_contact.steps import Outcome, Step, carried_out
from bench.static.kernels import Case

FOUND = 'print(\'{"device": "GPU 0", "arch": "sm_90"}\')'


def step(name: str, code: str, limit: float = 20) -> Step:
    return Step(name, lambda seconds: [sys.executable, "-S", "-c", code], limit, first._last_line)


def test_the_order_and_the_time_of_the_steps(tmp_path: Path) -> None:
    """The timing suite comes last, and has its least time where all others take their most."""
    steps = steps_of(tmp_path)
    names = ["environment", "compile all kernels", *CHECKED, "tests marked gpu", "timing suite"]
    assert [each.name for each in steps] == names
    assert sum(each.limit for each in steps[:-1]) + TIMING <= BUDGET < 480
    command = steps[-1].command(200)
    assert command[command.index("--budget") + 1] == "185" and command[command.index("--output") + 1] == str(tmp_path)


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    steps = [
        step("environment", FOUND),
        step("raises", "import sys; print('seen'); sys.exit('wanted 3, got 4')"),
        step("killed by a signal", "import os; os.kill(os.getpid(), 11)"),
        step("no such device", 'print(\'{"skipped": "one device"}\')'),
        step("unreadable", "print('{nonsense')"),
        Step("no such program", lambda seconds: [str(tmp_path / "none")], 5, str),
        step("last", 'print("noise"); print(\'{"x": 1}\')'),
    ]
    said: list[str] = []
    assert first_contact(tmp_path, make=lambda folder: steps, say=said.append) == 1
    (file,) = tmp_path.iterdir()
    assert file.name == "first_contact_gpu_0.json"
    made = json.loads(file.read_text())
    failed = ["raises", "killed by a signal", "unreadable", "no such program"]
    assert made["device"] == "GPU 0" and made["failed"] == failed and made["budget"] == BUDGET
    outcomes = {each["name"]: each for each in made["steps"]}
    assert list(outcomes) == [each.name for each in steps]
    assert [name for name, each in outcomes.items() if each["outcome"] == "failed"] == failed
    assert outcomes["killed by a signal"]["error"] == "exit code -11"
    assert outcomes["raises"]["error"] == "seen\nwanted 3, got 4"
    assert "cannot be read: JSONDecodeError" in outcomes["unreadable"]["error"]
    assert outcomes["no such device"]["outcome"] == "skipped"
    assert outcomes["last"]["found"] == {"x": 1} and outcomes["last"]["outcome"] == "passed"
    assert said[1] == f"failed: raises ({outcomes['raises']['seconds']:.1f} s)\n  wanted 3, got 4"
    assert said[-1] == f"3 of 7 steps passed; {file} is to be committed"


def test_all_that_passes_exits_with_0(tmp_path: Path) -> None:
    steps = [step("environment", FOUND), step("none", 'print(\'{"skipped": "one device"}\')')]
    assert first_contact(tmp_path, make=lambda folder: steps, say=str) == 0


def test_without_a_name_of_the_device_there_is_a_file_all_the_same(tmp_path: Path) -> None:
    steps = [step("environment", "raise RuntimeError('no driver')"), step("next", "print('{}')")]
    assert first_contact(tmp_path, make=lambda folder: steps, say=str) == 1
    made = json.loads((tmp_path / "first_contact_unknown_device.json").read_text())
    assert made["failed"] == ["environment"] and "no driver" in made["steps"][0]["error"]


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    """And what would begin after the budget is not begun."""
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    hangs = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    begun, so_far = time.monotonic(), []
    outcomes = carried_out(
        [step("hangs", hangs, 1.5), step("quick", "print('{}')"), step("long", "import time; time.sleep(60)")] * 2,
        4,
        lambda outcomes: so_far.append(len(outcomes)),
    )
    assert time.monotonic() - begun < 6
    assert [each.outcome for each in outcomes[:3]] == ["out of time", "passed", "out of time"]
    assert outcomes[0].error == "stopped after 2 s"
    assert outcomes[3:] == [Outcome(name, "not begun", 0.0) for name in ("hangs", "quick", "long")]
    assert not any(each.is_good for each in outcomes if each.name != "quick") and so_far == [1, 2, 3, 4, 5, 6]
    time.sleep(max(0.0, 4.5 - (time.monotonic() - begun)))
    assert not mark.exists()


def test_steps_see_no_network_and_no_interpreter() -> None:
    names = "HF_HUB_OFFLINE", "TRITON_INTERPRET"
    code = f"import json, os; print(json.dumps({{name: os.environ[name] for name in {names}}}))"
    (outcome,) = carried_out([step("settings", code)], 20)
    assert outcome.found == {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}


def test_what_pytest_prints_is_read() -> None:
    printed = "..F\nFAILED tests/kernels/test_on_a_gpu.py::test_x[4096] - assert\n1 failed, 2 passed in 3.00s\n"
    found = first._tests_passed(printed)
    assert found == {
        "summary": "1 failed, 2 passed in 3.00s",
        "failed": ["tests/kernels/test_on_a_gpu.py::test_x[4096]"],
    }
    with pytest.raises(ValueError, match=r"wanted tests that pass, got '8 skipped in 1\.00s'"):
        first._tests_passed("ssss\n8 skipped in 1.00s\n")


def test_a_timing_suite_that_was_stopped_leaves_what_it_has(tmp_path: Path) -> None:
    assert first._timed(tmp_path) is None
    (tmp_path / "cuda.json").write_text('{"rows": [1]}')
    assert first._timed(tmp_path) == {"rows": [1]}


@pytest.mark.quick
def test_without_a_device_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = ["--first-contact", "--output", str(tmp_path)]
    assert report.main(["--device", "cuda", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--device cuda: wanted a CUDA or ROCm device, torch ") and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        report.main(options)
    assert "--first-contact: wanted --device cuda" in capsys.readouterr().err


def test_with_a_device_the_command_carries_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1, 0, None)
    monkeypatch.setattr(first, "steps_of", lambda folder: [step("environment", FOUND), step("bad", "raise OSError")])
    assert report.main(["--device", "cuda", "--first-contact", "--output", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "first_contact_gpu_0.json").read_text())["failed"] == ["bad"]


def test_kernels_are_compiled_for_an_architecture_without_published_figures(aot) -> None:
    assert aot(part._compiled, Case("linear"), "sm_89") == ""


def test_a_kernel_that_does_not_compile_is_named(aot) -> None:
    with pytest.raises(RuntimeError, match="linear, bf16: ValueError: architecture 'gfx1100', wanted sm_80 or later"):
        aot(part.compile_all, "gfx1100", ("linear",))
