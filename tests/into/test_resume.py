"""Merges that were interrupted, killed, or ran out of disk: the next run goes on, and makes the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from toy_models import bytes_of, load_header, save_adapter, weights_of
from toy_vocabularies import numbered, save_toy, union_folder, write_tokenizer

import merge_engine
from merge_engine.cli.main import main
from merge_engine.errors import ModelError, OutputError
from merge_engine.into import place as into_place
from merge_engine.into import resume as into_resume
from merge_engine.into import write as into_write
from merge_engine.into.resume import files_in
from merge_engine.into.write import _write
from merge_engine.loops import door
from merge_engine.runtime.processes import Ranks


def interrupt(monkeypatch, after):
    """A run that dies after some tensors."""
    write, seen = _write, []

    def dying(*arguments):
        seen.append(1)
        if len(seen) > after:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(into_write, "_write", dying)


@pytest.mark.quick
def test_an_interrupted_run_goes_on_where_it_stopped(base, three, tmp_path, monkeypatch):
    recipe = {"method": "ties", "scope": "model", "density": 0.4, "shard_size": 900}
    merge_engine.merge_into(base, three, tmp_path / "want", **recipe)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_into(base, three, tmp_path / "out", **recipe)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    for change, message in [
        ({"density": 0.5}, r"with another density \(it was 0.4, now 0.5\)"),
        ({"weights": [1, 2, 3]}, "with another weights"),
        ({"shard_size": 901}, "with another shard_size"),
    ]:
        with pytest.raises(OutputError, match=message):
            merge_engine.merge_into(base, three, tmp_path / "out", **{**recipe, **change})
    with pytest.raises(OutputError, match="with another inputs"):
        merge_engine.merge_into(base, three[::-1], tmp_path / "out", **recipe)
    result = merge_engine.merge_into(base, three, tmp_path / "out", **recipe)
    assert result.resumed == 3
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")
    assert not (tmp_path / ".out.partial").exists()


def test_a_changed_input_is_not_resumed_with(base, three, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_into(base, three, tmp_path / "out")
    shutil.rmtree(three[1])
    save_adapter(three[1], 99)
    with pytest.raises(OutputError, match=r"an unfinished merge is in .*, with another inputs"):
        merge_engine.merge_into(base, three, tmp_path / "out")


def test_an_input_that_is_written_again_counts_as_another(base):
    """Only headers are hashed: of a large file with other data after its header the time of change tells."""
    file = base / "model.safetensors"
    before, stat = files_in(base, [file]), file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files_in(base, [file]) == before
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert files_in(base, [file]) != before


def test_a_run_with_compiled_loops_is_not_resumed_without(base, three, tmp_path, monkeypatch):
    """The terms of a product are added in another order."""
    assert door.installed()
    unfinished(base, three, tmp_path, monkeypatch)
    monkeypatch.setattr(door, "installed", lambda: False)
    with pytest.raises(OutputError, match=r"with another backend \(it was torch, now torch without Numba\)"):
        merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)


def test_no_rank_writes_before_all_have_read_the_journals(base, three, tmp_path, monkeypatch):
    """A rank that read lines of this run would take their tensors for those of an earlier one."""
    events = []

    def told(name, right):
        return lambda *arguments: (events.append(name), right(*arguments))[1]

    monkeypatch.setattr(into_write, "finished_keys", told("read", into_write.finished_keys))
    monkeypatch.setattr(into_write, "_write", told("write", _write))
    monkeypatch.setattr(Ranks, "wait", told("wait", Ranks.wait))
    merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    assert events.count("read") == 1
    assert events[events.index("read") + 1] == "wait"


NOTHING = ["5", "null", '{"merge": 5}', '{"tensor": 1, "xxh3": 2}', "[" * 100_000, '"merge"', "\xff"]


@pytest.mark.parametrize("line", NOTHING, ids=range(len(NOTHING)))
def test_a_line_of_the_journal_that_says_nothing_is_passed_over(base, three, tmp_path, monkeypatch, line):
    merge_engine.merge_into(base, three, tmp_path / "want", shard_size=900)
    journal = unfinished(base, three, tmp_path, monkeypatch)
    journal.write_bytes(journal.read_bytes() + line.encode("latin1") + b"\n")
    assert merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900).resumed == 5
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def test_a_journal_of_another_merge_that_lacks_a_field(base, three, tmp_path, monkeypatch):
    journal = unfinished(base, three, tmp_path, monkeypatch)
    first, *others = journal.read_text().splitlines()
    entry = json.loads(first)
    assert entry["merge"]["recipe"].pop("energy") is None
    journal.write_text("\n".join([json.dumps(entry), *others]) + "\n")
    with pytest.raises(OutputError, match=r"with another energy \(it was None, now None\)"):
        merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)


@pytest.mark.parametrize("first", [True, False], ids=["in the first run", "while resuming"])
def test_finished_tensors_survive_an_error_while_reading(base, three, tmp_path, monkeypatch, first):
    merge_engine.merge_into(base, three, tmp_path / "want", shard_size=900)
    if not first:
        unfinished(base, three, tmp_path, monkeypatch, after=2)
    real, seen = _write, []

    def failing(*arguments):
        seen.append(1)
        if len(seen) > 2:
            raise ModelError("the disk is broken") from (OSError(5, "Input/output error") if first else None)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(into_write, "_write", failing)
        with pytest.raises(ModelError, match="the disk is broken"):
            merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    assert merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900).resumed == (2 if first else 4)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def test_a_foreign_file_never_gets_into_the_output(base, three, tmp_path, monkeypatch):
    journal = unfinished(base, three, tmp_path, monkeypatch)
    (journal.parent / "thesis.tex").write_text("theirs")
    with pytest.raises(OutputError, match=r"out: \S+thesis\.tex is not of this merge; move or remove it"):
        merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    assert (journal.parent / "thesis.tex").read_text() == "theirs"
    (journal.parent / "thesis.tex").unlink()
    (journal.parent / ".journal.1").mkdir()
    with pytest.raises(OutputError, match=r"out: \S+\.journal\.1 is not of this merge; move or remove it"):
        merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    (journal.parent / ".journal.1").rmdir()
    assert merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900).resumed == 5


@pytest.mark.parametrize("where", ["data", "header", "journal"])
def test_a_flipped_bit_is_found_and_made_good(base, three, tmp_path, monkeypatch, caplog, where):
    merge_engine.merge_into(base, three, tmp_path / "want", shard_size=900)
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    folder = tmp_path / ".out.partial" / "result"
    if where == "journal":
        with open(folder / ".journal.0", "ab") as file:
            file.write(b'{"tensor": "lm_head.weight", "sha2')
    else:
        first = json.loads((folder / ".journal.0").read_text().splitlines()[1])["tensor"]
        path = next(path for path in folder.glob("*.safetensors") if first in load_header(path))
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        data[10 if where == "header" else 8 + length + load_header(path)[first]["data_offsets"][0]] ^= 4
        path.write_bytes(data)
    result = merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    assert result.resumed == 5 if where == "journal" else result.resumed < 5
    assert ("is damaged and will be written again" in caplog.text) == (where != "journal")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def test_kills_at_random_moments(big, tmp_path, forks):
    """Twelve kills, and runs that ended before theirs: always the bytes of a run that nobody disturbed."""
    base, adapters = big
    merge_engine.merge_into(base, adapters, tmp_path / "want", method="ties", shard_size="300KB")
    out = tmp_path / "out"
    command = ["merge", "--into", base, *adapters, "-o", out, "--method", "ties", "--shard-size", "300KB"]
    start = time.perf_counter()
    assert forks.run(command).codes == [0]  # not killed: it says how long one takes
    duration = time.perf_counter() - start
    shutil.rmtree(out)
    chance, killed = random.Random(1), 0
    for _ in range(100):
        if killed == 12:
            break
        (child,) = forks.start(command)
        time.sleep(chance.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        killed += forks.wait().codes == [-signal.SIGKILL]
        if not out.exists() and chance.random() < 0.5:
            merge_engine.merge_into(base, adapters, out, method="ties", shard_size="300KB")
        if out.exists():
            assert bytes_of(out) == bytes_of(tmp_path / "want")
            shutil.rmtree(out)
    assert killed == 12


def test_a_full_disk_is_one_error_and_can_be_resumed(big, tmp_path, monkeypatch):
    base, adapters = big
    recipe = {"method": "linear", "shard_size": "300KB"}
    merge_engine.merge_into(base, adapters, tmp_path / "want", **recipe)
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (disk / "other").write_bytes(bytes(2_000_000))
        with pytest.raises(OutputError, match=r"out needs [1-9]\.\d\d MB of disk, [1-9]\d*\.\d\d (M|K)B is free$"):
            merge_engine.merge_into(base, adapters, disk / "out", **recipe)
        assert {path.name for path in disk.iterdir()} == {"other"}
        with monkeypatch.context() as patch:
            patch.setattr(into_resume, "check_space", lambda *_: None)  # another process fills the disk meanwhile
            with pytest.raises(OutputError, match=r"cannot be written: No space left on device$"):
                merge_engine.merge_into(base, adapters, disk / "out", **recipe)
        assert not (disk / "out").exists()
        (disk / "other").unlink()
        assert merge_engine.merge_into(base, adapters, disk / "out", **recipe).resumed > 0
        assert bytes_of(disk / "out") == bytes_of(tmp_path / "want")
    finally:
        subprocess.run(["umount", disk], check=True)


def unfinished(base, adapters, tmp_path, monkeypatch, after=5):
    """The journal of a run that was interrupted after some tensors; its recipe is the default one."""
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_into(base, adapters, tmp_path / "out", shard_size=900)
    return tmp_path / ".out.partial" / "result" / ".journal.0"


def test_the_journal_has_the_hash_of_what_is_on_the_disk(base, three, tmp_path, monkeypatch):
    from xxhash import xxh3_128_hexdigest

    journal = unfinished(base, three, tmp_path, monkeypatch)
    entries = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len({entry["tensor"] for entry in entries}) == 5
    found = {}
    for path in journal.parent.glob("*.safetensors"):
        data, header = path.read_bytes(), load_header(path)
        start = 8 + int.from_bytes(data[:8], "little")
        for key in header.keys() - {"__metadata__"}:
            begin, end = header[key]["data_offsets"]
            found[key] = xxh3_128_hexdigest(data[start + begin : start + end])
    assert entries == [{"tensor": entry["tensor"], "xxh3": found[entry["tensor"]]} for entry in entries]


@pytest.mark.parametrize("old", [5, 2])
def test_what_an_older_journal_says_is_made_again(base, three, tmp_path, monkeypatch, caplog, old):
    """Lines with SHA-256, which the version before wrote: nothing is taken over from them, nor looked at."""
    merge_engine.merge_into(base, three, tmp_path / "want", shard_size=900)
    journal = unfinished(base, three, tmp_path, monkeypatch)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in lines[1 : 1 + old]:
        entry["sha256"] = 2 * entry.pop("xxh3")
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    result = merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    assert result.resumed == 5 - old and "damaged" not in caplog.text
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def test_a_kill_while_files_are_flushed_loses_nothing(base, three, tmp_path, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(into_place, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_engine.merge_into(base, three, tmp_path / "out", method="linear")
    monkeypatch.undo()
    result = merge_engine.merge_into(base, three, tmp_path / "out", method="linear")
    assert result.resumed == result.merged + result.copied == len(weights_of(base))


def test_an_interrupted_union_goes_on_and_no_other_vocabulary_does(toys, monkeypatch):
    base, models = toys
    want = bytes_of(union_folder(toys).rename(base.parent / "want"))
    write, seen = _write, []

    def dying(*arguments):
        seen.append(1)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(into_write, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            union_folder(toys)
    kept = (models[1] / "tokenizer.json").read_text()
    write_tokenizer(models[1], numbered("to", "be", "or", "<b>", "<c>"))  # the weights are what they were
    with pytest.raises(OutputError, match=r"with another vocab \(it was union of 5 tokens \w+, now union of 6 tokens"):
        union_folder(toys)
    (models[1] / "tokenizer.json").write_text(kept)
    base_rows = [save_toy(base.parent / str(i), numbered("to", "be", "or"), 4, seed=i) for i in (1, 2, 3)]
    with pytest.raises(OutputError, match="an unfinished merge is in"):
        merge_engine.merge_models(base, base_rows, base.parent / "out")
    assert main(["merge-models", "--base", str(base), *map(str, models), "-o", str(base.parent / "out")]) == 2
    out = base.parent / "out"
    assert merge_engine.merge_models(base, models, out, vocab="union").resumed == 2
    assert bytes_of(out) == want


def test_base_and_union_are_not_one_run(tmp_path, monkeypatch):
    """Models of one vocabulary, of which both could be: the journal tells them apart."""
    base, tuned = (save_toy(tmp_path / name, numbered("to"), 1, seed=i) for i, name in enumerate(["base", "tuned"]))
    with monkeypatch.context() as patch:
        patch.setattr(into_write, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_models(base, [tuned], tmp_path / "out")
    with pytest.raises(OutputError, match=r"with another vocab \(it was base, now union of 1 tokens"):
        merge_engine.merge_models(base, [tuned], tmp_path / "out", vocab="union")
