"""The command and the recipe: what users type, and what they are told when it is wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from lora_files import save_factors
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.cli.main import main
from merge_engine.cli.options import CHOICES
from merge_engine.engine.choose import BACKENDS
from merge_engine.errors import MergeError, RecipeError
from merge_engine.formats.open import open_adapter
from merge_engine.rules.methods import METHODS
from merge_engine.rules.recipe import DTYPES, Recipe
from merge_engine.rules.rule import CONVENTIONS


def save_plain(folder, seed, rank=4, rows=24, columns=40, modules=("layers.0.q_proj", "layers.1.q_proj"), **config):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, columns), (rows, rank)
    factors = {name: [torch.randn(shape, generator=generator) for shape in shapes] for name in modules}
    return save_factors(folder, factors, **config)


@pytest.fixture
def three(tmp_path):
    return [save_plain(tmp_path / name, seed) for seed, name in enumerate(["sql", "chat", "ads"])]


def run_cli(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def factors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, other):
    one, other = factors_of(one), factors_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_merge_command_equals_the_api(three, tmp_path, capsys):
    options = ["--method", "ties", "--density", "0.3", "--weights", "2", "1", "-0.5", "--rank", "3", "--scale", "0.5"]
    code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "one", *options)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'one'}: 3 adapters, 2 modules, rank up to 3, kept energy 0.")
    recipe = {"method": "ties", "density": 0.3, "weights": [2, 1, -0.5], "rank": 3, "scale": 0.5}
    merge_engine.merge(three, tmp_path / "two", **recipe)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_every_option_reaches_the_recipe(three, tmp_path, capsys):
    options = {
        "method": "dare_ties",
        "space": "delta",
        "election": "frequency",
        "scope": "model",
        "trim_ties": "keep",
        "convention": "mergekit",
        "dtype": "bfloat16",
        "seed": "7",
        "energy": "0.9",
        "scale": "2",
        "density": "0.5",
    }
    flags = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    code, _, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", *flags)
    assert (code, err) == (0, "")
    recipe = json.loads((tmp_path / "out" / "merge_report.json").read_text())["recipe"]
    assert {key: str(recipe[key]) for key in options} == {**options, "scale": "2.0"}


def test_density_by_adapter_and_by_pattern(three, tmp_path, capsys):
    for name, density, same in [
        ("each", ["0.1", "0.2", "0.3"], [0.1, 0.2, 0.3]),
        ("table", ["layers.0.*=0.1", ".*=0.4"], {"layers.0.*": 0.1, ".*": 0.4}),
    ]:
        code, _, err = run_cli(capsys, "merge", *three, "-o", tmp_path / name, "--density", *density)
        assert (code, err) == (0, "")
        merge_engine.merge(three, tmp_path / f"{name}-api", density=same)
        assert_same(tmp_path / name, tmp_path / f"{name}-api")


def test_recipe_file_and_options_over_it(three, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"adapters: [{', '.join(map(str, three))}]\noutput: {tmp_path / 'one'}\nmethod: ties\n"
        'density: {"layers.0.*": 0.3, ".*": [0.1, 0.2, 0.3]}\nweights: [2, 1, 1]\n'
    )
    assert run_cli(capsys, "merge", recipe)[0] == 0
    density = {"layers.0.*": 0.3, ".*": [0.1, 0.2, 0.3]}
    merge_engine.merge(three, tmp_path / "api", method="ties", density=density, weights=[2, 1, 1])
    assert_same(tmp_path / "one", tmp_path / "api")
    assert run_cli(capsys, "merge", recipe, "-o", tmp_path / "two", "--method", "linear")[0] == 0
    merge_engine.merge(three, tmp_path / "linear", method="linear", weights=[2, 1, 1])
    assert_same(tmp_path / "two", tmp_path / "linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: ties", "recipe.yaml: wanted a table of keys with a list of adapters"),
        ("[1, 2", "recipe.yaml: cannot be read: "),
        ("adapters: [a]\nmethods: ties\noutput: o", "recipe: wanted one of method, .*, got 'methods'"),
        ("adapters: [a]", "output: wanted a folder to write to"),
        ("adapters: [a, 7]\noutput: o", "recipe.yaml: adapters: wanted folders or hub ids, got 7"),
        ("adapters: [a, [b]]\noutput: o", "recipe.yaml: adapters: wanted folders or hub ids, got "),
        ("adapters: {a: [b]}\nmerges: []\noutput: o", "recipe.yaml: adapters: wanted folders or hub ids, got "),
        ("adapters: [a]\noutput: 5", "recipe.yaml: output: wanted a text, got 5"),
        ("adapters: [a]\noutput: o\ninto: [b]", "recipe.yaml: into: wanted a text, got "),
        ("adapters: [a]\noutput: o\noverwrite: 'no'", "recipe.yaml: overwrite: wanted true or false, got 'no'"),
        ("adapters: [a]\noutput: o\ninto: b\ndry_run: 1", "recipe.yaml: dry_run: wanted true or false, got 1"),
        ("adapters: [a]\noutput: o\nmethod: [ties]", "method: wanted one of linear, .*, got \\['ties'\\]"),
        ("adapters: [a]\noutput: o\nelection: {}", "election: wanted one of total, frequency, got {}"),
        ("adapters: [a]\noutput: o\ndensity: {1: 0.1}", "density: wanted a pattern of module names, got 1"),
        ("adapters: [a]\noutput: o\ndensity: &d {'.*': *d}", "density: wanted a number from 0 to 1, got "),
        ("adapters: [a]\noutput: o\nscale: 1e-1", "scale: wanted a finite number, got '1e-1'; write it as 0.1"),
        ("adapters: [a]\noutput: o\nmethod: ties\nmethod: linear", "wanted method once in a table, got it 2 times"),
        ("adapters: {a: b, a: c}\nmerges: []", "wanted a once in a table, got it 2 times"),
    ],
)
def test_recipe_file_mistakes(tmp_path, capsys, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    code, out, err = run_cli(capsys, "merge", tmp_path / "recipe.yaml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


def test_info_shows_what_an_adapter_is(three, capsys):
    code, out, err = run_cli(capsys, "info", three[0])
    assert (code, err) == (0, "")
    adapter = open_adapter(three[0])
    for name in adapter.modules:
        A, B = adapter.factors(name)
        line = next(line for line in out.splitlines() if name in line)
        assert line.split()[1:-1] == ["linear", "24", "x", "40", "4", "2"]
        assert float(line.split()[-1]) == pytest.approx(2 * (B.double() @ A.double()).norm().item(), rel=1e-3)
    assert "base model  base" in out and "modules     2, rank 4" in out and "size        0.00 MB" in out


def bad(**kwargs):
    """A mistake in the recipe, and the one line that names it."""
    message = kwargs.pop("message")
    return pytest.param(kwargs, message, id=message[:40])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        bad(method="tiez", message="method: wanted one of linear, cat, magnitude_prune, ties, dare_linear, dare_ties"),
        bad(weights=[1, 2], message="weights: wanted 3, one for each of sql, chat, ads, got 2"),
        bad(weights=[1, 2, float("nan")], message="weights: wanted a finite number, got nan"),
        bad(weights="1 2 3", message="weights: wanted a list of numbers, got '1 2 3'"),
        bad(density=1.5, message="density: wanted a number from 0 to 1, got 1.5"),
        bad(density=-0.1, message="density: wanted a number from 0 to 1, got -0.1"),
        bad(density="half", message="density: wanted a number from 0 to 1, got 'half'"),
        bad(density={"(": 0.5}, message=r"density: pattern '\(' is no regular expression: "),
        bad(density={"q": 2}, message="density: wanted a number from 0 to 1, got 2"),
        bad(density={"k_proj": 0.2}, message=r"density: no pattern of k_proj matches layers.0.q_proj; '\.\*' matches"),
        bad(density=[0.1, 0.2], message="density: wanted one number or 3, got 2"),
        bad(
            method="dare_ties",
            density=0.0,
            message="density: dare_ties divides by it, wanted a number above 0, got 0.0",
        ),
        bad(
            scope="model",
            density={"layers.0.*": 0.1, ".*": 0.2},
            message="density: scope='model' has one threshold for all of sql, wanted one density, got 0.1, 0.2",
        ),
        bad(space="deltas", message="space: wanted delta or factors, got 'deltas'"),
        bad(convention="peff", message="convention: wanted one of peft, mergekit, paper, got 'peff'"),
        bad(scale=float("inf"), message="scale: wanted a finite number, got inf"),
        bad(scale=1e39, message=r"scale: wanted a number that float32 holds, got 1e\+39"),
        bad(weights=[1, 2, -1e300], message=r"weights: wanted a number that float32 holds, got -1e\+300"),
        bad(seed=True, message="seed: wanted a whole number from 0 to"),
        bad(method=["ties"], message=r"method: wanted one of .*, got \['ties'\]"),
        bad(dtype=torch.float16, message="dtype: wanted one of float32, float16, bfloat16, got torch.float16"),
        bad(seed=-1, message=r"seed: wanted a whole number from 0 to 2\*\*64 - 1, got -1"),
        bad(rank=0, message="rank: wanted auto or a whole number of at least 1, got 0"),
        bad(rank="8", message="rank: wanted auto or a whole number of at least 1, got '8'"),
        bad(energy=0.0, message="energy: wanted a number above 0 and up to 1, got 0.0"),
        bad(dtype="int8", message="dtype: wanted one of float32, float16, bfloat16, got 'int8'"),
        bad(method="cat", rank=4, message="rank: cat stacks the factors"),
        bad(lambda_=1, message="recipe: wanted one of method, .*, got 'lambda_'"),
    ],
)
def test_mistakes_in_the_recipe(three, tmp_path, recipe, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        merge_engine.merge(three, tmp_path / "out", **recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ads", "chat", "sql"]


def test_no_adapters(tmp_path):
    with pytest.raises(RecipeError, match=r"^adapters: wanted at least one, got none$"):
        merge_engine.merge([], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "recipe", "message"),
    [
        ({"columns": 41}, {}, "^odd: layers.0.q_proj is linear \\[24, 41\\], wanted linear \\[24, 40\\] as in sql$"),
        ({"rank": 5}, {"space": "factors"}, "^odd: layers.0.q_proj has rank 5, wanted 4 as in sql: factors of diff"),
        ({"use_dora": True}, {}, "^odd: use_dora is set in adapter_config.json; "),
        ({"lora_bias": True}, {}, "^odd: lora_bias is set in adapter_config.json; "),
        ({"r": 3}, {}, "^odd: .*rank"),
    ],
)
def test_mistakes_in_the_adapters(three, tmp_path, change, recipe, message):
    odd = save_plain(tmp_path / "odd", 9, **change)
    with pytest.raises(MergeError, match=message):
        merge_engine.merge([*three, odd], tmp_path / "out", **recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ads", "chat", "odd", "sql"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(three, tmp_path, capsys, value):
    tensors = factors_of(three[1])
    key = "base_model.model.layers.1.q_proj.lora_B.weight"
    tensors[key][3, 2] = value
    save_file(tensors, three[1] / "adapter_model.safetensors")
    code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    kind = "NaN" if value != value else "Inf"
    file = three[1] / "adapter_model.safetensors"
    assert err == f"merge-engine: error: chat: tensor {key} in {file} holds {kind}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ads", "chat", "sql"]


def test_an_existing_output_is_kept_unless_overwritten(three, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_cli(capsys, "merge", *three, "-o", out, "--method", "linear")[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, err = run_cli(capsys, "merge", *three, "-o", out)
    assert code == 2
    assert err == f"merge-engine: error: {out} already exists; pass overwrite to replace it\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run_cli(capsys, "merge", *three, "-o", out, "--overwrite")[0] == 0
    assert json.loads((out / "merge_report.json").read_text())["recipe"]["method"] == "ties"


def test_a_warning_is_one_line(three, tmp_path, capsys):
    odd = save_plain(tmp_path / "odd", 9, base_model_name_or_path="other")
    code, _, err = run_cli(capsys, "merge", three[0], odd, "-o", tmp_path / "out")
    assert code == 0
    assert err.startswith("merge-engine: warning: odd was trained on other, sql on base: ") and err.count("\n") == 1


def test_the_commands_choices_are_the_tables():
    assert CHOICES["method"] == tuple(METHODS)
    assert CHOICES["convention"] == tuple(CONVENTIONS)
    assert CHOICES["dtype"] == tuple(DTYPES)
    assert CHOICES["backend"] == BACKENDS
    for name, choices in CHOICES.items():
        for choice in choices if name != "backend" else ():
            assert getattr(Recipe(**{name: choice}), name) == choice


@pytest.mark.parametrize("command", [[], ["merge"], ["info"], ["demo"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert not command or f"merge-engine {command[0]}" in out.split("example", 1)[1]


def imported_by(code):
    """Every module in sys.modules after running the code in a new process."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_imports_are_light():
    heavy = {"triton", "peft", "transformers", "torch._inductor", "huggingface_hub", "yaml", "tqdm"}
    assert not imported_by("import merge_engine.cli.main as main; main._parser()") & {*heavy, "torch", "numpy"}
    assert not imported_by("import torch, merge_engine; merge_engine.merge") & heavy - imported_by("import torch")


def test_works_without_triton_peft_and_transformers(three, tmp_path):
    code = (
        "import sys\n"
        "for name in ('triton', 'peft', 'transformers'): sys.modules[name] = None\n"
        f"import merge_engine; merge_engine.merge({[str(p) for p in three]}, {str(tmp_path / 'out')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert open_adapter(tmp_path / "out").modules


def test_a_killed_merge_leaves_nothing_or_everything(tmp_path):
    """SIGKILL at random moments: the target is missing or complete, and the next run is not in the way of anything."""
    modules = [f"layers.{i}.q_proj" for i in range(6)]
    adapters = [save_plain(tmp_path / str(i), i, rank=8, rows=300, columns=400, modules=modules) for i in range(2)]
    out = tmp_path / "out"
    ready = "import sys, merge_engine.engine; print('ready', flush=True); sys.stdin.read(1);"
    code = f"{ready} merge_engine.merge({[str(a) for a in adapters]}, {str(out)!r}, overwrite=True)"
    start = time.perf_counter()
    whole = merge_engine.merge(adapters, tmp_path / "whole").path
    duration = time.perf_counter() - start
    chance, seen = random.Random(0), set()
    for attempt in range(12):
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        child.stdin.write(b"x")
        child.stdin.flush()
        time.sleep(chance.uniform(0, 1.5 * duration))
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        if out.exists():
            assert_same(out, whole)
            assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
        seen.add((out.exists(), child.returncode))
        if attempt % 3 == 2 and out.exists():
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
    assert any(code == -signal.SIGKILL for _, code in seen)
    merge_engine.merge(adapters, out, overwrite=True)
    assert_same(out, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "whole", "out"}


def test_arrays_and_tensors_are_numbers(three):
    """What a search over weights holds."""
    plain = merge_engine.merge(three, method="ties", weights=[2.0, 1.0, -0.5], density=[0.25, 0.5, 0.75], scale=0.5)
    given = {"weights": [np.float32(2), np.array(1), -0.5], "density": torch.tensor([0.25, 0.5, 0.75])}
    merged = merge_engine.merge(three, method="ties", scale=np.float32(0.5), seed=np.int64(3), **given)
    assert merged.plan.recipe.weights == (2.0, 1.0, -0.5) and merged.plan.recipe.density == [0.25, 0.5, 0.75]
    for name, module in plain.modules.items():
        assert torch.equal(merged.modules[name].A, module.A) and torch.equal(merged.modules[name].B, module.B)
    assert len(repr(merged)) < 200


def test_one_adapter_is_no_list_of_letters(three, tmp_path):
    for merge in (merge_engine.merge, lambda source, out: merge_engine.merge_into(source, source, out)):
        with pytest.raises(
            MergeError, match=r"^adapters: wanted a list of folders or hub ids, got '.*sql'$|wanted a full"
        ):
            merge(str(three[0]), tmp_path / "out")
    with pytest.raises(MergeError, match="wanted a list of folders"):
        merge_engine.Session(str(three[0]))


def test_the_rank_that_is_told_is_that_of_the_result(three, tmp_path, capsys):
    code, out, _ = run_cli(capsys, "merge", *three, "-o", tmp_path / "out", "--energy", "0.3")
    rank = json.loads((tmp_path / "out" / "merge_report.json").read_text())["modules"]
    highest = max(module["rank"] for module in rank.values())
    assert code == 0 and highest < 12 and f"rank up to {highest}, " in out
    with pytest.raises(SystemExit):
        main(["merge", *map(str, three), "-o", "o", "--rank", "2.5"])
    assert "wanted auto or a whole number, got '2.5'" in capsys.readouterr().err


def test_8_bit_adapters_are_written_as_what_holds_them(tmp_path):
    eight, full = torch.float8_e4m3fn, torch.float32
    folders = []
    for name, dtype in (("a", eight), ("b", eight), ("c", full)):
        A, B = torch.arange(60.0).reshape(3, 20) / 8, torch.arange(21.0).reshape(7, 3) / 4 - 2
        folders.append(save_factors(tmp_path / name, {"q": (A.to(dtype), B.to(dtype))}))
    A, B = (factors_of(folders[0])[f"base_model.model.q.lora_{side}.weight"].double() for side in "AB")
    for inputs, method, written in ((folders[:2], "linear", torch.bfloat16), (folders[1:], "cat", torch.float32)):
        merge_engine.merge(inputs, tmp_path / method, method=method)
        assert {tensor.dtype for tensor in factors_of(tmp_path / method).values()} == {written}
    got = merge_engine.merge(folders[:2], method="linear").modules["q"]
    torch.testing.assert_close(got.B.double() @ got.A.double(), 4 * B @ A, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_cannot_be_read(three, tmp_path, capsys):
    three[0].chmod(0)
    try:
        code, out, err = run_cli(capsys, "merge", *three, "-o", tmp_path / "out")
    finally:
        three[0].chmod(0o755)
    assert (code, out) == (2, "") and err.startswith("merge-engine: error: sql: ") and err.count("\n") == 1


def test_names_that_are_not_utf8(three, tmp_path):
    odd = os.fsencode(tmp_path) + b"/bad\xff"
    os.rename(three[0], odd)
    arguments = [odd, os.fsencode(three[1]), b"-o", os.fsencode(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "merge_engine", b"merge", *arguments], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "bad" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "merge_engine", b"info", odd], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and b"bad" in done.stdout


def test_nobody_reads_what_is_printed(three):
    code = f"{sys.executable} -m merge_engine info {three[0]} {three[1]} | true; echo ${{PIPESTATUS[0]}}"
    for buffered in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environment)
        assert (done.stdout, done.stderr) == ("141\n", "")


def test_an_interrupted_merge_says_so_in_one_line(tmp_path):
    modules = [f"layers.{i}.q_proj" for i in range(40)]
    adapters = [save_plain(tmp_path / str(i), i, rank=8, rows=700, columns=800, modules=modules) for i in range(2)]
    command = [sys.executable, "-m", "merge_engine", "merge", *adapters, "-o", tmp_path / "out", "--method", "ties"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".out.partial").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert (child.returncode, told) == (130, "merge-engine: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
