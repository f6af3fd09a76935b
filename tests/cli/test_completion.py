"""merge-engine completion."""

import shutil
import subprocess

import pytest
from command_line import run_cli

from merge_engine.cli import completion

SHELLS = ("bash", "zsh", "fish")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_reads_its_script(shell, capsys, tmp_path):
    pytest.importorskip("shtab")
    code, out, err = run_cli(capsys, "completion", shell)
    assert (code, err) == (0, "") and "--density" in out.replace("-l density", "--density") and "merge-models" in out
    if shutil.which(shell):
        (tmp_path / "script").write_text(out)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def completed(script, words):
    """What bash offers for the last of the words."""
    typed = " ".join(f"'{word}'" for word in words)
    code = f"""{script}
COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}
_shtab_merge_engine; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_choices_and_files(capsys, tmp_path, monkeypatch):
    pytest.importorskip("shtab")
    _, script, _ = run_cli(capsys, "completion", "bash")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sql-adapter").mkdir()
    assert completed(script, ["merge-engine", "com"]) == ["compare", "completion"]
    assert completed(script, ["merge-engine", "merge", "--dens"]) == ["--density"]
    assert completed(script, ["merge-engine", "merge", "--method", "dare_t"]) == ["dare_ties"]
    assert completed(script, ["merge-engine", "merge", "sql"]) == ["sql-adapter"]


def test_without_shtab_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    code, out, err = run_cli(capsys, "completion", "bash")
    assert (code, out) == (2, "") and err.endswith("wanted: pip install 'merge-engine[completion]'\n")
