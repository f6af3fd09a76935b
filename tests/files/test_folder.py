"""Folders that appear whole or not at all."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

import merge_engine
from merge_engine.errors import OutputError
from merge_engine.files import working
from merge_engine.files.folder import place_file, place_folder
from merge_engine.files.journal import Journal
from merge_engine.files.safetensors_writer import SafetensorsWriter
from merge_engine.files.working import MARK

ROOT = Path(__file__).parents[2]


def write_model(folder: Path, text: str = "new") -> None:
    (folder / "config.json").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_text(text * 1000)


def is_model(folder: Path, text: str = "new") -> bool:
    return (folder / "config.json").read_text() == text and (folder / "sub" / "weights").read_text() == text * 1000


@pytest.mark.quick
def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "out"
    with place_folder(target) as folder:
        assert folder == tmp_path / ".out.partial" / "result"
        write_model(folder)
        assert not target.exists()
    assert is_model(target)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.quick
@pytest.mark.parametrize("place", [place_folder, place_file])
def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_is_afterwards(tmp_path, monkeypatch, place):
    """Or a machine that stops leaves an empty file of the right name."""
    out, flush, flushed = tmp_path / "out", os.fsync, set()

    def noted(descriptor):
        flushed.add((os.fstat(descriptor).st_ino, out.exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with place(out) as folder:
        write_model(folder)
        (folder / "out").write_text("new")
    made = {path.stat().st_ino for path in (out, *out.rglob("*"))}
    assert len(made) == (5 if place is place_folder else 1)
    assert flushed >= {(inode, False) for inode in made} | {(tmp_path.stat().st_ino, True)}


@pytest.mark.quick
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error), place_folder(tmp_path / "out") as folder:
        write_model(folder)
        raise error
    assert os.listdir(tmp_path) == []


def test_missing_parents_are_made_and_removed_again(tmp_path):
    with pytest.raises(RuntimeError), place_folder(tmp_path / "a" / "b" / "out") as folder:
        write_model(folder)
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with place_folder(tmp_path / "a" / "b" / "out") as folder:
        write_model(folder)
    assert is_model(tmp_path / "a" / "b" / "out")


def test_a_parent_that_others_use_by_now_stays(tmp_path):
    with pytest.raises(RuntimeError), place_folder(tmp_path / "a" / "out"):
        (tmp_path / "a" / "theirs").touch()
        raise RuntimeError
    assert os.listdir(tmp_path / "a") == ["theirs"]


A_RECIPE = {"method": "linear"}


@pytest.mark.parametrize(
    "call",
    [
        lambda: merge_engine.merge(["sql", "chat"], A_RECIPE),
        lambda: merge_engine.merge_into("base", ["sql"], A_RECIPE),
        lambda: merge_engine.merge_models("base", ["model"], A_RECIPE),
        lambda: merge_engine.merge_recipe("recipe.yaml", A_RECIPE),
        lambda: merge_engine.search(["sql", "chat"], "true {path}", A_RECIPE),
        lambda: merge_engine.sweep(["sql", "chat"], {"scale": [1]}, A_RECIPE),
        lambda: merge_engine.normalize("sql", A_RECIPE),
    ],
)
def test_a_recipe_in_the_place_of_an_output_is_refused_before_anything_is_read(call):
    with pytest.raises(OutputError, match=r"^output: wanted the path to write to, got a dict; .*: method='linear'"):
        call()


def test_an_existing_target_is_refused_at_once(tmp_path):
    write_model(tmp_path, "old")
    with pytest.raises(OutputError, match=r"already exists; pass overwrite to replace it"), place_folder(tmp_path):
        pytest.fail("the block ran")
    assert is_model(tmp_path, "old")
    assert not tmp_path.with_name(f".{tmp_path.name}.partial").exists()


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OutputError, match="already exists"), place_folder(tmp_path / "out") as folder:
        write_model(folder)
        (tmp_path / "out").mkdir()
        write_model(tmp_path / "out", "theirs")
    assert is_model(tmp_path / "out", "theirs")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.quick
def test_overwrite_replaces_a_model_only_on_success(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    write_model(target, "old")
    (target / "stale").touch()
    with pytest.raises(RuntimeError), place_folder(target, overwrite=True) as folder:
        write_model(folder)
        raise RuntimeError
    assert is_model(target, "old")
    with place_folder(target, overwrite=True) as folder:
        write_model(folder)
        assert is_model(target, "old")
    assert is_model(target)
    assert not (target / "stale").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_takes_an_empty_folder_but_no_other(tmp_path):
    (tmp_path / "empty").mkdir()
    with place_folder(tmp_path / "empty", overwrite=True) as folder:
        write_model(folder)
    assert is_model(tmp_path / "empty")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="holds no model"), place_folder(tmp_path / "home", overwrite=True):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(OutputError, match="out is a file"), place_folder(tmp_path / "out", overwrite):
        pytest.fail("the block ran")
    with pytest.raises(OutputError, match="Not a directory"), place_folder(tmp_path / "out" / "deeper", overwrite):
        pytest.fail("the block ran")
    assert (tmp_path / "out").read_text() == "keep"


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with (
        pytest.raises(OutputError, match=r"out needs 1000000\.00 TB of disk, \d+\.\d\d [GT]B is free"),
        place_folder(tmp_path / "a" / "out", required_bytes=10**18),
    ):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="No space left"), place_folder(tmp_path / "out") as folder:
        (folder / "x.safetensors").symlink_to("/dev/full")
        with SafetensorsWriter(folder / "x.safetensors", ["a"]) as writer:
            writer.add("a", torch.ones(1_000_000))
    assert os.listdir(tmp_path) == []


def test_no_permission_is_one_clear_error():
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        if root := os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with (
                pytest.raises(OutputError, match=r"out cannot be written: Permission denied"),
                place_folder(Path(name, "out")),
            ):
                pytest.fail("the block ran")
        finally:
            if root:
                os.seteuid(0)
        assert os.listdir(name) == []


def test_a_link_means_the_place_it_leads_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    for overwrite in (False, True):
        with place_folder(tmp_path / "out", overwrite) as folder:
            write_model(folder)
        assert is_model(tmp_path / "disk" / "model")
    assert os.listdir(tmp_path / "disk") == ["model"]
    assert (tmp_path / "out").is_symlink()


def test_a_read_only_file_system_is_one_clear_error(monkeypatch):
    with pytest.raises(OutputError, match=r"/proc/out cannot be written: "), place_folder(Path("/proc/out")):
        pytest.fail("the block ran")


@pytest.mark.quick
@pytest.mark.parametrize("moment", ["mkdir", "open", "flock", "touch"])
def test_an_interrupt_while_the_working_folder_is_made_leaves_nothing(tmp_path, monkeypatch, moment):
    """It comes just after each of the steps."""
    owner = {"mkdir": Path, "touch": Path, "open": os, "flock": fcntl}[moment]
    step, target = getattr(owner, moment), tmp_path / "out"

    def interrupted(*arguments, **options):
        monkeypatch.undo()
        step(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, moment, interrupted)
    with pytest.raises(KeyboardInterrupt), place_folder(target):
        pytest.fail("it was not interrupted")
    assert list(tmp_path.iterdir()) == []
    with place_folder(target) as folder:
        write_model(folder)
    assert is_model(target)


def test_two_writers_of_one_target(tmp_path):
    with place_folder(tmp_path / "out") as folder:
        write_model(folder)
        with pytest.raises(OutputError, match="is being written by another process"), place_folder(tmp_path / "out"):
            pytest.fail("the block ran")
        assert is_model(folder)
    assert is_model(tmp_path / "out")


def test_a_lock_on_a_folder_that_is_gone_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking, another process removes the folder, and a third one makes it anew."""
    right, partial, seen = fcntl.flock, tmp_path / ".out.partial", []

    def late(descriptor, how):
        if not seen:
            partial.rmdir()
            partial.mkdir()
        seen.append(descriptor)
        right(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with place_folder(tmp_path / "out") as folder:
        assert len(seen) == 2
        write_model(folder)
        with pytest.raises(OutputError, match="is being written by another process"), place_folder(tmp_path / "out"):
            pytest.fail("the block ran")
    assert is_model(tmp_path / "out") and os.listdir(tmp_path) == ["out"]


def test_a_working_folder_that_is_no_longer_ours_is_left_alone(tmp_path, monkeypatch):
    """The user removes the working folder, and makes another of this name, while the first writer fails."""
    target, real_fsync = tmp_path / "out", os.fsync

    def fail_after_rename(descriptor: int) -> None:
        if target.exists():
            (tmp_path / ".out.partial").rename(tmp_path / "moved")
            (tmp_path / ".out.partial").mkdir()
            raise OSError(5, "Input/output error")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_after_rename)
    with pytest.raises(OutputError, match="Input/output error"), place_folder(target) as folder:
        write_model(folder)
    assert (tmp_path / ".out.partial").exists()


def test_leftovers_of_a_killed_process_are_wiped(tmp_path):
    (tmp_path / ".out.partial" / "result" / "sub").mkdir(parents=True)
    (tmp_path / ".out.partial" / MARK).touch()
    (tmp_path / ".out.partial" / "result" / "stale").touch()
    with place_folder(tmp_path / "out") as folder:
        assert os.listdir(folder) == []
        write_model(folder)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "sub"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_replacement_killed_half_way_is_undone(tmp_path):
    (tmp_path / ".out.partial" / "replaced").mkdir(parents=True)
    (tmp_path / ".out.partial" / MARK).touch()
    write_model(tmp_path / ".out.partial" / "replaced", "old")
    with pytest.raises(OutputError, match="already exists"), place_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert is_model(tmp_path / "out", "old")
    assert os.listdir(tmp_path) == ["out"]


def link_to_a_folder(place: Path, theirs: Path) -> None:
    place.symlink_to(theirs)


def folder_of_theirs(place: Path, _: Path) -> None:
    write_model(place_made(place), "theirs")


def foreign_file(place: Path, _: Path) -> None:
    (place_made(place) / MARK).touch()
    (place / "thesis.tex").write_text("theirs")


def linked_result(place: Path, theirs: Path) -> None:
    (place_made(place) / MARK).touch()
    (place / "result").symlink_to(theirs)


def file_of_theirs(place: Path, _: Path) -> None:
    place.write_text("theirs")


def place_made(place: Path) -> Path:
    place.mkdir()
    return place


THEIRS = {
    link_to_a_folder: "it is a link",
    folder_of_theirs: r"it has no \.merge-engine in it",
    foreign_file: r"thesis\.tex in it is of someone else",
    linked_result: "result in it is a link",
    file_of_theirs: "it is no folder",
}


@pytest.mark.quick
@pytest.mark.parametrize("make", THEIRS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("resume", [False, True])
def test_a_working_folder_that_is_not_ours_is_never_touched(tmp_path, make, resume):
    (tmp_path / "theirs").mkdir()
    write_model(tmp_path / "theirs", "theirs")
    make(tmp_path / ".out.partial", tmp_path / "theirs")
    before = everything(tmp_path)
    wanted = rf"out: \S+\.out\.partial is wanted as working folder, but {THEIRS[make]}; move or remove it"
    with pytest.raises(OutputError, match=wanted), place_folder(tmp_path / "out", resume=resume):
        pytest.fail("the block ran")
    with pytest.raises(OutputError, match=wanted), place_file(tmp_path / "out"):
        pytest.fail("the block ran")
    assert everything(tmp_path) == before


def everything(folder: Path) -> dict[str, str]:
    """{path: text of the file, target of the link, or nothing for a folder}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path)] = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
    return found


def test_an_unfinished_model_is_not_wiped_by_another_merge(tmp_path):
    with pytest.raises(RuntimeError), place_folder(tmp_path / "out", resume=True) as folder:
        with Journal(folder) as journal:
            journal.begin({"recipe": "ties"})
        (folder / "shard").write_text("half")
        raise RuntimeError
    before = everything(tmp_path)
    for place in (place_folder, place_file):
        with pytest.raises(OutputError, match=r"an unfinished merge into a model is in \S+\.out\.partial"):
            with place(tmp_path / "out"):
                pytest.fail("the block ran")
    assert everything(tmp_path) == before
    with place_folder(tmp_path / "out", resume=True) as folder:
        assert (folder / "shard").read_text() == "half"


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "two renames"])
def test_where_names_cannot_be_exchanged_two_renames_do_it(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(working, "_exchange", lambda *_: False)
    for text in ("old", "new"):
        with place_folder(tmp_path / "out", overwrite=True) as folder:
            write_model(folder, text)
        assert is_model(tmp_path / "out", text)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("fail", [("result",), ("result", "replaced")], ids=["put back", "put back by the next"])
def test_an_old_result_stays_where_the_new_one_cannot_follow(tmp_path, monkeypatch, fail):
    monkeypatch.setattr(working, "_exchange", lambda *_: False)
    with place_folder(tmp_path / "out") as folder:
        write_model(folder, "old")
    rename = Path.rename

    def fails(path, target):
        if path.name in fail and Path(target).name == "out":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="Input/output error"), place_folder(tmp_path / "out", True) as folder:
        write_model(folder)
    monkeypatch.undo()
    assert (tmp_path / "out").exists() == ("replaced" not in fail)
    with pytest.raises(OutputError, match="already exists"), place_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert is_model(tmp_path / "out", "old")
    assert os.listdir(tmp_path) == ["out"]


# A process that forks one child for each step of a placement and has it killed at that step. Written here rather than
# forked from the test runner, which has threads.
KILLER = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    from merge_engine.files.folder import place_folder

    folder, overwrite, delays = Path(sys.argv[1]), sys.argv[2] == "overwrite", int(sys.argv[3])
    target = folder / "out"

    def write(path, text):
        (path / "config.json").write_text(text)
        for i in range(4):
            (path / f"weights{i}").write_text(text * 100000)

    def state():
        if not target.exists():
            return "none"
        texts = {(target / "config.json").read_text()} | {(target / f"weights{i}").read_text()[:3] for i in range(4)}
        sizes = {(target / f"weights{i}").stat().st_size for i in range(4)}
        return texts.pop() if len(texts) == 1 and sizes == {300000} else f"broken {texts} {sizes}"

    def run(text, kill_at=None):
        steps = 0
        def step(*_):
            nonlocal steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        fsync = os.fsync
        def counted(descriptor):
            step()
            fsync(descriptor)
        os.fsync = counted
        # The audit events cover every open, mkdir, rename, remove and rmdir.
        sys.addaudithook(lambda event, args: step() if event.startswith(("os.", "open", "shutil.")) else None)
        with place_folder(target, overwrite) as working:
            write(working, text)

    def reset():
        if overwrite:
            pid = os.fork()
            if not pid:
                run("old")
                os._exit(0)
            os.waitpid(pid, 0)
        else:
            import shutil
            shutil.rmtree(target, ignore_errors=True)

    reset()
    seen, at = [], 0
    while True:
        at += 1
        pid = os.fork()
        if not pid:
            run("new", None if delays else at)
            os._exit(0)
        if delays:
            time.sleep(random.Random(at).uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        seen.append(state())
        if (at == delays) if delays else os.WIFEXITED(status):
            break
        reset()
    json.dump([seen, sorted(os.listdir(folder))], sys.stdout)
"""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("delays", [0, 12], ids=["at every step", "at random times"])
def test_a_kill_leaves_no_target_or_a_whole_one(tmp_path, overwrite, delays):
    arguments = [str(tmp_path), "overwrite" if overwrite else "new", str(delays)]
    command = [sys.executable, "-c", textwrap.dedent(KILLER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    seen, left = json.loads(done.stdout)
    assert set(seen) <= ({"old", "new"} if overwrite else {"none", "new"})
    if not delays:
        assert len(seen) > 15
        assert set(seen) == ({"old", "new"} if overwrite else {"none", "new"})
        assert seen[-1] == "new"
        assert left == ["out"]  # the last run, not killed, cleaned up after all those before


WRITER = """
import sys
import time
from pathlib import Path
from merge_engine.files.folder import place_folder

with place_folder(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_does_not_block_the_next(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None and child.stdout.readline() == b"in\n"
    with pytest.raises(OutputError, match="another process"), place_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with place_folder(tmp_path / "out") as folder:
        write_model(folder)
    assert is_model(tmp_path / "out")


def test_what_is_merged_is_never_replaced(tmp_path):
    """A trainer's folder has checkpoints in it: as an output it would take them along."""
    run = tmp_path / "run"
    inputs = [run / "checkpoint-1", run / "checkpoint-2"]
    for folder in (run, *inputs):
        folder.mkdir()
        write_model(folder, "old")
    (tmp_path / "link").symlink_to(inputs[0])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.json").symlink_to(inputs[1] / "config.json")
    targets = (run, inputs[0], tmp_path / "link", inputs[1] / ".." / "checkpoint-2")
    for target, sources in [(target, inputs) for target in targets] + [(run, [tmp_path / "linked"])]:
        with (
            pytest.raises(OutputError, match=r"run\S* holds \S+, which is merged; wanted another folder"),
            place_folder(target, overwrite=True, inputs=sources),
        ):
            raise AssertionError("not reached")
    assert all(is_model(folder, "old") for folder in (run, *inputs))
    with place_folder(inputs[0] / "merged", inputs=inputs) as folder:
        write_model(folder)
    with place_folder(inputs[0] / "merged", overwrite=True, inputs=inputs) as folder:
        write_model(folder, "newer")
    assert is_model(inputs[0] / "merged", "newer")


@pytest.mark.quick
def test_an_old_result_that_is_half_removed_is_never_put_back(tmp_path, monkeypatch):
    """Also not where its user has removed the new one by then."""
    out = tmp_path / "out"

    def make(text):
        with place_folder(out, overwrite=True) as folder:
            (folder / "config.json").write_text(text)
            (folder / "weights").write_text(text)

    def killed(path, *_, **__):
        (Path(path) / "weights").unlink()
        raise KeyboardInterrupt

    make("old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            make("new")
    assert (out / "weights").read_text() == "new"
    shutil.rmtree(out)
    with pytest.raises(ZeroDivisionError), place_folder(out):
        assert not out.exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
