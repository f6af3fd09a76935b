"""Hostile input that follows coverage: bytes that reach new lines of the readers are changed further.

    python tests/helpers/coverage_fuzz.py safetensors 600 CORPUS    seconds, and a folder that keeps what was reached

Readers: those of TARGETS. Needs atheris (`pip install atheris`), Linux and Python 3.11 to 3.13. Each input must end in
exit code 0 or 2 within 10 seconds and 2 GB. The first input of each finding is written beside the corpus.
"""

import contextlib
import io
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["merge_engine", "yaml"]):
    import merge_engine.cli.main as command
    import merge_engine.engine.plan
    import merge_engine.files.plain_yaml
    import merge_engine.formats.open
    import merge_engine.formats.single_file
    import merge_engine.mergekit.recipe
    import merge_engine.rules.patterns
    import merge_engine.rules.recipe  # noqa: F401

from hostile_toys import save_toys, split_header
from hostile_values import BASE_FIELDS, FIELDS, RECIPE_FIELDS

from merge_engine.errors import MergeError
from merge_engine.rules.methods import METHODS

DRY = ("-o", "out", "--dry-run")
MERGEKIT = """merge_method: ties
base_model: base
models:
  - model: model
    parameters: {weight: [0.5, 1], density: [{filter: mlp, value: 0.5}, 0.3]}
parameters: {normalize: true, int8_mask: true}
slices_: null
tokenizer: {source: union, tokens: {<new>: {source: base, force: true}}}
dtype: float32
"""
OURS = """adapters: [a, {path: b, weight: 2}]
method: ties
density: {".*q_proj": 0.2, ".*": 0.5}
scale: auto
gain: 0.7
rank: 2
sweep: {seed: [1, 2]}
"""
CONFIG = """{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"], "use_rslora": false,
"rank_pattern": {"model.layers.0.q_proj": 2}, "alpha_pattern": {"(a|b)*.*up_proj": 4}, "modules_to_save": null}"""
BASE = """{"vocab_size": 5, "tie_word_embeddings": false, "torch_dtype": "float32", "architectures": ["Llama"]}"""
# {name: (the file, its first bytes where it is not a toy's, the command)}
TARGETS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "safetensors": ("a/adapter_model.safetensors", None, ("info", "a")),
    "single": ("image.safetensors", None, ("info", "image.safetensors")),
    "config": ("a/adapter_config.json", CONFIG, ("info", "a")),
    "base": ("base/config.json", BASE, ("merge", "a", "b", "--into", "base", *DRY)),
    "recipe": ("recipe.yaml", OURS, ("merge", "recipe.yaml", *DRY)),
    "mergekit": ("recipe.yml", MERGEKIT, ("merge", "recipe.yml", *DRY)),
}
WORDS = [*RECIPE_FIELDS, *METHODS, *FIELDS, *BASE_FIELDS, "data_offsets", "dtype", "shape", "__metadata__"]
WORDS += ["F32", "BF16", "F8_E4M3", "null", "1e400", "merge_method", "slices", "layer_range", "filter", "anchor: &a"]
IMAGE = {f"lora_unet_down_blocks_0_attentions_0_{name}": shape for name, shape in (("to_q", (6, 8)), ("to_k", (6, 8)))}


def main() -> None:
    name, seconds, corpus = sys.argv[1], sys.argv[2], Path(sys.argv[3]).absolute()
    file, first, words = TARGETS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    os.fsync = lambda _: None
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        os.chdir(place)
        save_toys(Path())
        _save_image(Path("image.safetensors"))
        headers = file.endswith(".safetensors")
        start, data = split_header(Path(file)) if headers else (first.encode(), b"") if first else (b"", b"")
        (corpus / "first").write_bytes(start)
        options = command.make_parser().parse_args(words)
        seen: set[tuple[str, int]] = set()

        def try_bytes(changed: bytes) -> None:
            length = len(changed).to_bytes(8, "little") if headers else b""
            Path(file).write_bytes(length + changed + data)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    options.run(options)
            except MergeError:
                return  # the command prints it in one line, and ends with 2
            except (Exception, SystemExit) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = last.filename, last.lineno or 0
                if where not in seen:
                    seen.add(where)
                    kept = corpus.with_name(f"{name}-finding-{len(seen)}")
                    kept.write_bytes(changed)
                    print(f"{kept}: {type(error).__name__} at {where}: {error}", file=sys.__stderr__, flush=True)

        words_known = Path("words")
        words_known.write_text("".join(f'"{word}"\n' for word in WORDS))
        limits = [
            f"-dict={words_known}",
            f"-max_total_time={seconds}",
            "-timeout=10",
            "-rss_limit_mb=4096",
            "-max_len=4096",
        ]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={corpus.parent}/{name}-", str(corpus)], try_bytes)
        atheris.Fuzz()


def _save_image(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, (m, n) in IMAGE.items():
        down, up = torch.ones(2, n), torch.ones(m, 2)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, file, metadata={"ss_network_dim": "2"})


if __name__ == "__main__":
    main()
