"""The command as a whole: help, imports, and how it ends."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import run_cli
from plain_adapters import assert_same, save_plain

import merge_engine
from merge_engine.cli.main import main
from merge_engine.formats.open import open_adapter


def test_a_warning_is_one_line(three, tmp_path, capsys):
    odd = save_plain(tmp_path / "odd", 9, base_model_name_or_path="other")
    code, _, err = run_cli(capsys, "merge", three[0], odd, "-o", tmp_path / "out")
    assert code == 0
    assert err.startswith("merge-engine: warning: odd was trained on other, sql on base: ") and err.count("\n") == 1


@pytest.mark.quick
@pytest.mark.parametrize("command", [[], ["merge"], ["info"], ["demo"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert not command or f"merge-engine {command[0]}" in out.split("example", 1)[1]


def imports_of(code, before=""):
    """The modules that are new in sys.modules after running the code in a new process, after other code."""
    script = f"import sys\n{before}\nbefore = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_imports_are_light():
    heavy = {"triton", "peft", "transformers", "torch._inductor", "huggingface_hub", "yaml", "tqdm"}
    assert not imports_of("import merge_engine.cli.main as main; main.make_parser()") & {*heavy, "torch", "numpy"}
    assert not imports_of("import merge_engine; merge_engine.merge", before="import torch") & heavy


def test_works_without_triton_peft_and_transformers(three, tmp_path, forks):
    """None of them is imported before a merge (see above), nor needed by one."""
    absent = "import sys; sys.modules.update(dict.fromkeys(['triton', 'peft', 'transformers']))"
    assert forks.run(["merge", *three, "-o", tmp_path / "out"], first=absent).codes == [0]
    assert open_adapter(tmp_path / "out").modules


def test_a_killed_merge_leaves_nothing_or_everything(tmp_path, forks):
    """SIGKILL at random moments: the target is missing or complete, and the next run is not in the way of anything."""
    modules = [f"layers.{i}.q_proj" for i in range(6)]
    adapters = [save_plain(tmp_path / str(i), i, rank=8, rows=300, columns=400, modules=modules) for i in range(2)]
    out, whole = tmp_path / "out", tmp_path / "whole"
    start = time.perf_counter()
    assert forks.run(["merge", *adapters, "-o", whole]).codes == [0]
    duration = time.perf_counter() - start
    chance, killed = random.Random(0), 0
    for attempt in range(12):
        (child,) = forks.start(["merge", *adapters, "-o", out, "--overwrite"])
        time.sleep(chance.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        killed += forks.wait().codes == [-signal.SIGKILL]
        if out.exists():
            assert_same(out, whole)
            assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
        if attempt % 3 == 2 and out.exists():
            shutil.rmtree(out)
    assert killed
    merge_engine.merge(adapters, out, overwrite=True)
    assert_same(out, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "whole", "out"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_cannot_be_read(three, tmp_path, capsys):
    three[0].chmod(0)
    try:
        code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out")
    finally:
        three[0].chmod(0o755)
    assert (code, out) == (2, "") and err.startswith("merge-engine: error: sql: ") and err.count("\n") == 1


def test_names_that_are_not_utf8(three, tmp_path, forks):
    odd = os.fsencode(tmp_path) + b"/bad\xff"
    os.rename(three[0], odd)
    done = forks.run(["merge", odd, three[1], "-o", tmp_path / "out"])
    assert (done.codes, done.err) == ([0], "")
    assert "bad" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    done = forks.run(["info", odd])
    assert (done.codes, done.err) == ([0], "") and "bad" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("merge", "{a}", "{b}", "-o", "{long}"), "cannot be written: File name too long"),
        (("merge", "{a}", "{b}", "-o", "{almost}"), "cannot be written: File name too long"),  # with .partial it is
        (("merge", "{a}", "{long}", "-o", "out"), "does not exist, wanted a folder"),
        (("merge", "{long}.yaml"), "cannot be read: "),
    ],
)
def test_names_that_are_too_long(three, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    names = {"a": three[0], "b": three[1], "long": "x" * 300, "almost": "x" * 250}
    before = sorted(tmp_path.iterdir())
    code, _, err = run_cli(capsys, *(word.format(**names) for word in words))
    assert code == 2 and err.startswith("merge-engine: error: ") and message in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set; start by torchrun, or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "RANK below WORLD_SIZE, got RANK '0' and WORLD_SIZE 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK below WORLD_SIZE, got RANK '2' and WORLD_SIZE '2'"),
    ],
)
def test_ranks_that_cannot_be(three, tmp_path, capsys, monkeypatch, ranks, message):
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    code, _, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_nobody_reads_what_is_printed(three):
    code = f"{sys.executable} -m merge_engine info {three[0]} {three[1]} | true; echo ${{PIPESTATUS[0]}}"
    for buffered in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environment)
        assert (done.stdout, done.stderr) == ("141\n", "")


def test_an_interrupted_merge_says_so_in_one_line(tmp_path, forks):
    modules = [f"layers.{i}.q_proj" for i in range(40)]
    adapters = [save_plain(tmp_path / str(i), i, rank=8, rows=700, columns=800, modules=modules) for i in range(2)]
    (child,) = forks.start(["merge", *adapters, "-o", tmp_path / "out", "--method", "ties"])
    while not (tmp_path / ".out.partial").exists():
        assert not (tmp_path / "out").exists(), "it ended before it could be interrupted"
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    done = forks.wait()
    assert (done.codes, done.err) == ([130], "merge-engine: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
