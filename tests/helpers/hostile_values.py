"""Values, texts and tensors that have done harm, and their neighbours: what hostile cases put into files."""

from collections.abc import Callable
from typing import Any

import torch
from hostile_toys import INTO, MERGE, MODELS, SLOW, UNION

STEM = "base_model.model."
DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (None, 5, -1, 0, 1.5, 1e308, 10**400, "x", "", "\x1b[2J\n\u202e", True, [], [5], [None])
VALUES += ({}, {"x": 5}, {"q_proj": None}, {"q_proj": "\udc80"}, [["x"]], DEEP, float("nan"), float("inf"))
FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "target_parameters")
FIELDS += ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "trainable_token_indices", "peft_type")
FIELDS += ("init_lora_weights", "fan_in_fan_out", "use_dora", "lora_bias", "bias", "target_modules", "no_such_field")
BASE_FIELDS = ("vocab_size", "text_config", "tie_word_embeddings", "architectures", "auto_map", "torch_dtype")
BASE_FIELDS += ("quantization_config", "num_hidden_layers")
TOKENIZER_FIELDS = ("model", "added_tokens", "version")

JSON_FILES = {
    "a/adapter_config.json": MERGE,
    "base/config.json": INTO,
    "base/tokenizer.json": UNION,
    "model/tokenizer.json": UNION,
    "model/tokenizer_config.json": MODELS,
    "base/tokenizer_config.json": UNION,
    "base/special_tokens_map.json": UNION,
    "base/added_tokens.json": UNION,
    "a/adapter_model.safetensors.index.json": MERGE,
    "base/model.safetensors.index.json": INTO,
}
JSON_TEXTS = (b"", b"{", b"null", b"5", b"[]", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\0", b"NaN")
JSON_TEXTS += (
    b"{}",
    b"9" * 5000,
    b"\xef\xbb\xbf{}",
    '{"x": "ü"}'.encode("utf-16"),
    b'{"x": 1, "x": 2}',
    b'{"x": "\xff"}',
)

PATTERNS = (*SLOW, "(" * 3000 + ")" * 3000, "a{99999999999}", "(", "[", "*", "a**")
PATTERNS += (
    r"(a)\3",
    "(?P<x>a)(?P=x)",
    "(?i)q_proj",
    "(?i:Q)_proj",
    "x" * 200_000,
    "",
    "$",
    "^",
)
PATTERNS += ("(?<=.*)a", "a)|(b", "\x1b[2J", "\0", "(?=.*(?=.*z))*", "(?#", "[z-a]", r"\Z", r"\p{L}", "(?>a)", "a++")

HEADERS: dict[str, Any] = {
    "huge": {"shape": [2**63, 0], "data_offsets": [0, 0]},
    "huge product": {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]},
    "dimensions": {"shape": [1] * 3000, "data_offsets": [0, 4]},
    "negative": {"shape": [-1, -1], "data_offsets": [0, 4]},
    "float": {"shape": [1.0], "data_offsets": [0, 4]},
    "true": {"shape": [True], "data_offsets": [0, 4]},
    "text": {"shape": ["1"], "data_offsets": [0, 4]},
    "null": {"shape": None, "data_offsets": [0, 4]},
    "number": {"shape": 5, "data_offsets": [0, 4]},
    "no offsets": {"data_offsets": None},
    "three offsets": {"data_offsets": [0, 1, 2]},
    "turned": {"data_offsets": [4, 0]},
    "beyond": {"data_offsets": [0, 2**62]},
    "huge offset": {"data_offsets": [2**70, 2**70]},
    **{
        f"dtype {each!r}": {"dtype": each}
        for each in ("F4", "F8_E8M0", "F8_E4M3FNUZ", "I64", "C64", "U16", "\x1b", "", None)
    },
    **{f"dtype {each!r}": {"dtype": each} for each in (5, [], {}, True)},
}
KEYS = (
    "",
    STEM,
    f"{STEM}.lora_A.weight",
    f"{STEM}lora_A.weight",
    "\x1b[2J",
    "\ud800",
    "x" * 100_000,
    f"{STEM}..lora_A.weight",
)
KEYS += (
    "lm_head.weight",
    f"{STEM}lm_head.weight",
    f"{STEM}a.lora_A.weight",
    f"{STEM}a\0.lora_B.weight",
    "__metadata__",
)

DOCUMENTS = (
    "5",
    "null",
    "[]",
    "a: &a [*a]",
    "&a [*a, *a]",
    "!!python/object/apply:os.system [ls]",
    "!!map 5",
    "x: 2020-99-99",
)
DOCUMENTS += (
    "- " * 5000,
    "[" * 5000,
    "{a: 1, a: 2}",
    "? [1]\n: 2",
    "? {a: 1}\n: 2",
    "5: 6",
    "~: 1",
    "\0",
    "\x1b",
    "a: !x 1",
)
DOCUMENTS += (
    "method: &a [x,x]\nscale: [*a,*a]",
    "a: " + "9" * 10_000,
    "a: 1e999",
    "%YAML 9.9\n---\na: 1",
    "a: b: c",
    "\t",
)
DOCUMENTS += (
    "a: 0o9",
    "a: 0x",
    "a: 1:99:99",
    "a: =",
    "<<: 5",
    "<<: [5]",
    "<<: *b",
    "a: !!int x",
    "a: !!float {}",
    "--- 1\n--- 2",
)
DOCUMENTS += (
    "a: !!bool x",
    "a: !!null x",
    "a: !!binary x",
    "a: !!set [1]",
    "a: !!omap 5",
    "a: !!timestamp x",
    "a: !<x> y",
)
DOCUMENTS += (
    f"{'k' * 100_000}: 1",
    "\n".join(f"k{i}: {i}" for i in range(20_000)),
    "a: |9\n b",
    "a: >-\n\tb",
    "'",
    '"\\x',
    "&",
)

RECIPE_FIELDS = (
    "method weights density scale gain gamma mask min_tasks balance election scope trim_ties convention "
    "seed backend dtype saved space rank energy ranks into sweep merges evaluate output overwrite "
    "block_weights adapters base models memory"
).split()
ENVIRONMENTS = (
    {"WORLD_SIZE": "x"},
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "x"},
    {"WORLD_SIZE": "2", "RANK": "2"},
)
ENVIRONMENTS += ({"WORLD_SIZE": "-1", "RANK": "0"}, {"WORLD_SIZE": "", "RANK": ""}, {"WORLD_SIZE": "1.5", "RANK": "0"})
ENVIRONMENTS += (
    {"WORLD_SIZE": "2", "RANK": "0"},
    {"WORLD_SIZE": "\u0663", "RANK": "\u0660"},
    {"WORLD_SIZE": "0", "RANK": "0"},
)
PATHS = (
    "~nouser/x",
    "/dev/null",
    "/dev/zero",
    "",
    ".",
    "\x1b[2J",
    "x" * 300,
    "x" * 5000,
    "a/adapter_config.json",
    "user/re/po",
    "é/\udcff",
)

# Made in the process of the case only: operators of torch before a fork may block after it.
BAD_TENSORS: dict[str, Callable[[], Any]] = {
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(2, 2, device="meta"),
    "sparse": lambda: torch.ones(2, 2).to_sparse(),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "complex": lambda: torch.ones(2, 2, dtype=torch.complex128),
    "conj": lambda: torch.ones(2, 2, dtype=torch.complex64).conj(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "float8": lambda: torch.ones(2, 2).to(torch.float8_e4m3fnuz),
    "float8 scale": lambda: torch.ones(2, 2).to(torch.float8_e8m0fnu),
    "expanded": lambda: torch.ones(1).expand(10**6, 10**6),
    "dimensions": lambda: torch.ones([1] * 65),
    "list": lambda: [1, 2],
    "number": lambda: 5,
    "text": lambda: "\x1b[2J",
    "table": lambda: {"a": 1},
    "none": lambda: None,
}
