"""Faults that the tests have to notice: each is planted in a copy of the checkout, where the nearest tests must fail.

    python tests/helpers/planted_faults.py [FOLDER ...]      (some folders of merge_engine, or all)

Run it by hand after tests were moved or made faster. It prints a line a fault and ends with 1 where one was not seen.
A fault whose text is no longer there is an error: bring the list up to date.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """In `file`, `text` becomes `fault`; `tests` are the nearest ones."""

    file: str
    text: str
    fault: str
    tests: str


FAULTS = [
    Fault("rules/rule.py", "self.min_k) + self.extra_k", "self.min_k)", "tests/rules"),
    Fault("rules/philox.py", "return round(density * 2**32)", "return int(density * 2**32) - 1", "tests/rules"),
    Fault("rules/factor_weights.py", 'side == "A" and x < 0', "x < 0", "tests/engine tests/peft_backend"),
    Fault("cpu/keep.py", "return np.nextafter(value, np.float32(-1)), value", "return value, value", "tests/cpu"),
    Fault(
        "cpu/merge_tile_by_torch.py",
        "elects_plus = np.greater_equal if",
        "elects_plus = np.greater if",
        "tests/cpu tests/rules",
    ),
    Fault(
        "cpu/select.py", "kth.bits).view(np.float32)), kth.quota", "kth.bits).view(np.float32)), kth.equal", "tests/cpu"
    ),
    Fault("cpu/overlap.py", "opposed=((shared - agreeing) / 2)", "opposed=((shared + agreeing) / 2)", "tests/compare"),
    Fault("loops/tile_loops.py", "share + own if agrees else share", "share + own", "tests/loops tests/cpu"),
    Fault(
        "lowrank/auto_scale.py",
        "if merged_norm == 0:\n        return 1.0",
        "if merged_norm == 0:\n        return gain",
        "tests/lowrank",
    ),
    Fault(
        "lowrank/core_methods.py",
        "(cores.of_columns(weights) * cores.vectors.s)",
        "(cores.vectors.s)",
        "tests/lowrank/test_core_methods.py",
    ),
    Fault(
        "lowrank/cores.py",
        "start = sum(self.ranks[:t])",
        "start = self.ranks[0] * t",
        "tests/lowrank/test_cores.py tests/lowrank/test_core_methods.py",
    ),
    Fault("lowrank/gram.py", "(w * norms).sum() / w.abs().sum()", "(w * norms).sum()", "tests/lowrank/test_gram.py"),
    Fault(
        "formats/peft_config.py",
        "alpha / math.sqrt(rank) if",
        "alpha / rank if",
        "tests/formats tests/engine/test_merge.py",
    ),
    Fault("formats/peft_writer.py", '"^(" + "|".join', '"(" + "|".join', "tests/formats"),
    Fault("files/folder.py", "        os.fsync(descriptor)\n", "        os.fstat(descriptor)\n", "tests/files"),
    Fault("models/finetuned.py", "count[tokens] += 1", "count[tokens] = 1", "tests/models"),
    Fault(
        "into/resume.py",
        "        check_same(found, identity, output, folder)\n",
        "        found = dict(found)\n",
        "tests/into/test_resume.py",
    ),
    Fault("into/write.py", "delta.mul_(scale).add_(base", "delta.add_(base", "tests/into/test_core_methods.py"),
    Fault("engine/cut.py", "norm = math.sqrt(squared_norm)", "norm = squared_norm", "tests/engine/test_scale.py"),
    Fault("many/cache.py", "if used >= self._merge - 1:", "if used > self._merge:", "tests/many"),
    Fault("peft_backend/factors.py", ".mul_(sign).div_(count)", ".mul_(sign)", "tests/peft_backend/test_factors.py"),
    Fault("sweeps/readings.py", "if len(numbers) > 1:", "if len(numbers) > 9:", "tests/sweeps"),
    Fault(
        "mergekit/recipe.py", "weights, scale = [share * weight", "weights, scale = [scale * weight", "tests/mergekit"
    ),
]


def is_noticed(fault: Fault) -> bool:
    """Whether a test fails in a copy with the fault in it."""
    with tempfile.TemporaryDirectory() as folder:
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        for name in names:
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        file = Path(folder, "merge_engine", fault.file)
        source = file.read_text()
        if source.count(fault.text) != 1:
            raise SystemExit(f"{fault.file}: wanted {fault.text!r} once, got it {source.count(fault.text)} times")
        file.write_text(source.replace(fault.text, fault.fault))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            *fault.tests.split(),
        ]
        environment = {**os.environ, "PYTHONPATH": folder}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode == 1


def main(folders: list[str]) -> int:
    """The number of faults that no test has noticed."""
    missed = 0
    for fault in FAULTS:
        if folders and fault.file.split("/")[0] not in folders:
            continue
        noticed = is_noticed(fault)
        missed += not noticed
        print(f"{'noticed' if noticed else 'MISSED '}  {fault.file}: {' '.join(fault.fault.split())}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
