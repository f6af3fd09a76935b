"""How a command line is read: lists before and after adapters, and mistakes in one line."""

import json

import pytest
from command_line import run_cli
from toy_models import save_adapter, save_base
from tuned_models import save_model
from tuned_models import save_three as save_models

from merge_engine.cli.main import main
from merge_engine.cli.parser import join_lists, meant, split_list


def fails(capsys, *arguments):
    """The one line that a command line is refused with."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "") and err.count("\n") == 1
    return err


@pytest.mark.quick
@pytest.mark.parametrize(
    "given",
    [
        ["--weights", "2", "1", "0.5", "A", "B", "C"],
        ["--weights", "2,1,0.5", "A", "B", "C"],
        ["A", "B", "C", "--weights", "2", "1", "0.5"],
        ["A", "B", "C", "--weights=2,1", "0.5"],
        ["--weights", "2", "1,0.5", "--scale", "2", "A", "B", "C"],
    ],
)
def test_lists_may_stand_before_the_adapters(three, tmp_path, capsys, given):
    names = dict(zip("ABC", three, strict=True))
    code, _, err = run_cli(capsys, "merge", *(names.get(each, each) for each in given), "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["recipe"]["weights"] == [2.0, 1.0, 0.5]


@pytest.mark.quick
def test_what_belongs_to_a_list():
    def joined(*arguments):
        return list(join_lists(arguments))

    assert joined("--density", ".*q=0.3", ".*=0.2", "sql", "-o", "x") == ["--density=.*q=0.3\n.*=0.2", "sql", "-o", "x"]
    assert joined("--weights", "-1", "1e-3", "sql") == ["--weights=-1\n1e-3", "sql"]
    assert joined("--density", "--weights", "1") == ["--density=--weights\n1"]  # refused later, by its text
    assert joined("a", "--weights") == ["a", "--weights"]
    assert joined("--", "--weights", "1", "2") == ["--", "--weights", "1", "2"]
    assert joined("--sweep", "method=ties,linear", "scale=1,2", "a") == ["--sweep=method=ties,linear\nscale=1,2", "a"]
    assert split_list("2,1\n.*=0.2\na,b=1") == ["2", "1", ".*=0.2", "a,b=1"]


@pytest.mark.quick
def test_mistakes_are_one_line_that_says_what_was_meant(three, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--wieghts is no option; did you mean --weights?" in fails(capsys, "merge", *three, "--wieghts", "2")
    assert "got merg; did you mean merge?" in fails(capsys, "merg", *three)
    assert fails(capsys, "merge", *three, "--method", "tsvv").startswith("merge-engine: error: --method: wanted linear")
    for wrong in ("tsvv", "tvs"):
        assert "did you mean tsv?" in fails(capsys, "merge", *three, "--method", wrong)
    assert "--rank: wanted auto or a whole number, got 'x'" in fails(capsys, "merge", *three, "--rank", "x")
    assert "--sweep: expected one argument; see merge-engine merge --help" in fails(capsys, "merge", *three, "--sweep")
    assert fails(capsys, "merge", "-o", out).startswith("merge-engine: error: the following arguments are required")
    assert not out.exists() and meant("entirely", ["--weights"]) == ""


@pytest.mark.quick
def test_an_option_is_named_as_it_is_typed(three, tmp_path, capsys):
    """In a message of a merge too; not where it stands in a file, nor where the name is an adapter's."""
    assert run_cli(capsys, "merge", *three, "--density", "1.5", "-o", tmp_path / "x")[::2] == (
        2,
        "merge-engine: error: --density: wanted a number from 0 to 1, got 1.5\n",
    )
    assert "error: --min-tasks: " in run_cli(capsys, "merge", *three, "--min-tasks", "3", "-o", tmp_path / "x")[2]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"adapters: [{three[0]}, {three[1]}]\noutput: {tmp_path / 'x'}\ndensity: 1.5\n")
    assert "error: density: wanted" in run_cli(capsys, "merge", recipe)[2]


@pytest.mark.parametrize(
    ("command", "made"),
    [
        ("merge sql chat", "."),
        ("merge lora --into full", "."),
        ("merge sql chat --sweep scale=0.5", "scale=0.5"),
        ("merge-models --base models/base models/chat", "."),
        ("merge-models --method karcher models/base models/chat", "."),
        ("normalize sql", "."),
    ],
)
def test_the_option_that_replaces_an_output_is_named_as_it_is_typed(
    three, tmp_path, monkeypatch, capsys, command, made
):
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "full")
    save_adapter(tmp_path / "lora", 1)
    save_models(save_model(tmp_path / "models" / "base", 0))
    taken = tmp_path / "out" / made
    taken.mkdir(parents=True)
    code, _, err = run_cli(capsys, *command.split(), "-o", "out")
    assert (code, err.count("\n")) == (2, 1) and err.endswith("; pass --overwrite to replace it\n")


def test_a_folder_that_holds_no_model_is_kept(three, tmp_path, capsys):
    (tmp_path / "sql" / "notes").mkdir()
    (tmp_path / "sql" / "notes" / "a.txt").touch()
    error = run_cli(capsys, "merge", *three[1:], "-o", tmp_path / "sql" / "notes", "--overwrite")[2]
    assert "notes holds no model, so --overwrite does not replace it; remove it or choose another folder" in error
