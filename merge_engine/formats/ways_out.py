"""What cannot be merged as it is, and the way out: adapters of PEFT's other methods, and starts that change the base.

Checked by running PEFT 0.21.2: each method that is said to convert does, and LoRA gives the same outputs then.
"""

_CONVERT = (
    "PEFT makes a LoRA of it: peft.save_as_lora(path, model, rank), or convert_to_lora, for adapters of linear layers"
)
_INTO_ITS_BASE = (
    "put it into its base with PEFT's merge_and_unload, save that, and merge full models: merge-engine merge-models"
)
_NO_WEIGHTS = "it adds to what the model reads, and changes no weight: there is nothing to merge"
_MIXES = "it weighs several adapters anew for every input, so it is no one delta: merge the adapters that it mixes"

# By peft_type. Others of PEFT's are without a row: they are refused without advice.
OTHER_METHODS: dict[str, str] = {
    **dict.fromkeys(["VERA", "LOHA", "LOKR", "VBLORA", "RANDLORA", "UNILORA", "TINYLORA", "GRALORA"], _CONVERT),
    **dict.fromkeys(["DELORA", "FOURIERFT", "WAVEFT", "C3A", "PSOFT", "MISS"], _CONVERT),
    "ADALORA": f"PEFT's convert_to_lora does not take AdaLoRA; {_INTO_ITS_BASE}",
    **dict.fromkeys(["OFT", "BOFT", "HRA", "HIRA", "IA3", "SHIRA", "ROAD", "LN_TUNING"], _INTO_ITS_BASE),
    **dict.fromkeys(["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"], _NO_WEIGHTS),
    **dict.fromkeys(["ADAPTION_PROMPT", "CPT", "CARTRIDGE"], _NO_WEIGHTS),
    **dict.fromkeys(["XLORA", "POLY"], _MIXES),
}

_CONVERT_START = (
    "save it again with PEFT's path_initial_model_for_weight_conversion to make it a plain LoRA of twice the rank: an "
    "argument of save_pretrained, the adapter as it was before training, saved with init_lora_weights=True"
)
# By how init_lora_weights begins: starts that PEFT subtracts from the base weights.
STARTS: dict[str, str] = {
    **dict.fromkeys(["pissa", "olora", "corda", "lora_ga"], _CONVERT_START),
    "loftq": "its start makes up for what quantization took from the base, so it fits that quantized base alone; "
    + _INTO_ITS_BASE,
}


def way_out(table: dict[str, str], name: object) -> str:
    """The advice for a name, or for a name that begins with it, after a semicolon; empty where there is none."""
    found = next((text for start, text in table.items() if str(name).startswith(start)), None)
    return "" if found is None else f"; {found}"
