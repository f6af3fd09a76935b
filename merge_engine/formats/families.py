"""Families of LoRA files, as tables: how each spells its tensors, whose names it has, and what is not plain LoRA.

Names are kept as they are read. So adapters are merged only where they agree in both: a translation of names is the
work of the tool whose names they are.

Sources: the loaders of diffusers 0.38, ComfyUI, kohya's sd-scripts, OneTrainer, ai-toolkit, musubi-tuner and mlx-lm.
"""

import re
import warnings
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, NamedTuple

from merge_engine.errors import AdapterError

if TYPE_CHECKING:
    from merge_engine.formats.adapter import Adapter


class Family(NamedTuple):
    """How the files of some tools are made.

    name: as it stands in messages. names: whose names of modules it has; None where they fit any: those of text
    encoders only. single: whether an adapter is one .safetensors file. own_ranks: whether its modules may have ranks of
    their own.
    """

    name: str
    names: str | None = None
    single: bool = True
    own_ranks: bool = True

    def __str__(self) -> str:
        return f"{self.name} with {self.names}" if self.names else self.name


PEFT = Family("PEFT's folder", single=False)
MLX = Family("MLX's folder", single=False, own_ranks=False)
KOHYA, PEFT_NAMED, DIFFUSERS = "kohya's file", "a PEFT-named file", "an early diffusers file"


class Spelling(NamedTuple):
    """The ends of the keys of one pair: A is ``down``, B is ``up``. mid: of a convolution in three factors."""

    family: str
    down: str
    up: str
    mid: str | None = None

    @property
    def sides(self) -> dict[str, str]:
        """{ending: side}."""
        ends = {self.down: "down", self.up: "up"}
        return ends if self.mid is None else {**ends, self.mid: "mid"}


SPELLINGS = (
    Spelling(KOHYA, ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight"),
    Spelling(PEFT_NAMED, ".lora_A.weight", ".lora_B.weight"),
    Spelling(f"{PEFT_NAMED} of adapter 'default'", ".lora_A.default.weight", ".lora_B.default.weight"),
    Spelling(f"{PEFT_NAMED} without .weight", ".lora_A", ".lora_B"),
    Spelling(DIFFUSERS, ".lora.down.weight", ".lora.up.weight"),
    Spelling(DIFFUSERS, "_lora.down.weight", "_lora.up.weight"),
    Spelling(DIFFUSERS, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
ENDINGS = {ending: (spelling, side) for spelling in SPELLINGS for ending, side in spelling.sides.items()}
ALPHA = ".alpha"

_ANY_UNET, _BARE = "lora_unet_ names", "bare names"
# (how a module's name begins, whose names these are); the first match counts. Text encoders go with any model.
_NAMES: tuple[tuple[str, str | None], ...] = (
    (r"lora_te\d?_|lora_prior_te_|text_encoder(_\d)?\.|text_encoders\.|conditioner\.", None),
    (r"lora_unet__", "names after lora_unet__ (Wan Fun)"),
    (r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|label_emb)", "lora_unet_ names of SDXL's blocks"),
    (r"lora_unet_(down_blocks|mid_block|up_blocks|time_embedding|add_embedding)", "lora_unet_ names of diffusers"),
    (r"lora_unet_", _ANY_UNET),
    (r"lora_prior_unet_", "lora_prior_unet_ names (Stable Cascade)"),
    (r"lora_transformer_", "lora_transformer_ names (OneTrainer)"),
    (r"lycoris_", "lycoris_ names (SimpleTuner)"),
    (r"unet\.", "names after unet. (diffusers)"),
    (r"transformer(_\d)?\.", "names after transformer. (diffusers)"),
    (r"diffusion_model\.", "names after diffusion_model. (ComfyUI, ai-toolkit)"),
    (r"base_model\.model\.", "names after base_model.model. (PEFT)"),
    (r"", _BARE),
)
# `unet_conv_in` and the like are in either naming of SDXL.
_EITHER = re.compile(r"lora_unet_(conv_in|conv_out|out_2|out_0)\b")

_EXTRACT = "extract a LoRA from a model that it is merged into, as sd-scripts' extract_lora_from_models.py does"
# (a pattern of keys, why such a tensor cannot be merged, and the way out)
REFUSED: tuple[tuple[str, str], ...] = (
    (r"\.dora_scale$|\.lora_magnitude_vector(\.|$)", f"it is DoRA's, which rescales the base weight; {_EXTRACT}"),
    (r"\.hada_", f"it is LoHa's, a product of two LoRAs element by element; {_EXTRACT}"),
    (r"\.lokr_", f"it is LoKr's, a Kronecker product; {_EXTRACT}"),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$|\.glora", f"it is GLoRA's, which depends on the base weight; {_EXTRACT}"),
    (r"\.(b?oft)_", f"it is OFT's, which rotates the base weight; {_EXTRACT}"),
    (r"\.on_input$|\.ia3", f"it is IA3's, which scales the base weight; {_EXTRACT}"),
    (r"\.diff(_b)?$", "it is a whole difference of a weight or a bias, and no LoRA"),
    (r"\.set_weight$", "it replaces a weight, and is no LoRA"),
    (r"\.reshape_weight$", "it changes the shape of a base weight"),
    (r"\.[wb]_norm$", "it is a whole difference of a norm, and no LoRA"),
    (r"\.lora_(B|up)\.bias$", "it is a bias of LoRA, which is not part of the delta"),
    (r"^bundle_emb\.", "it is an embedding of new words that OneTrainer bundles; save the LoRA without it"),
)

_DIFFUSERS_SAVES = "diffusers' load_lora_weights followed by save_lora_weights makes diffusers' files of them"
# What turns the files of one family, or of one tool's names, into those of another; a folder and a file have no row.
_CONVERTERS = {
    **{frozenset(two): _DIFFUSERS_SAVES for two in combinations_with_replacement((KOHYA, PEFT_NAMED, DIFFUSERS), 2)},
    frozenset({KOHYA}): "sd-scripts' convert_flux_lora.py and musubi-tuner's convert_lora.py translate names",
    frozenset({PEFT_NAMED}): "musubi-tuner's convert_lora.py and diffusers' save_lora_weights translate names",
    frozenset({PEFT.name, MLX.name}): "no tool converts them; mlx_lm.fuse merges an adapter of MLX into its model",
}


def names_of(modules: Sequence[str], adapter: str) -> str | None:
    """Whose names these are; None of text encoders. AdapterError where they are of two tools."""
    found: dict[str, str] = {}
    for module in modules:
        whose = next(whose for begin, whose in _NAMES if re.match(begin, module))
        if whose is not None and not _EITHER.match(module):
            found.setdefault(whose, module)
    # Names that do not say whose they are, beside others that do.
    if any(whose.startswith(_ANY_UNET) for whose in found.keys() - {_ANY_UNET}):
        found.pop(_ANY_UNET, None)
    if found.keys() - {_BARE}:
        found.pop(_BARE, None)
    if len(found) > 1:
        (one, first), (two, second), *_ = found.items()
        raise AdapterError(f"{adapter}: {first} is of {one}, {second} of {two}; wanted names of one kind")
    return next(iter(found), None)


def check_one_family(adapters: Sequence["Adapter"]) -> None:
    """Raise AdapterError, where two adapters are spelled or named differently; it names a tool that converts.

    Warns (UserWarning) where two files of image models have no module in common.
    """
    for number, adapter in enumerate(adapters):
        for other in adapters[:number]:
            one, two = other.family, adapter.family
            if one.name != two.name or (one.names != two.names and None not in (one.names, two.names)):
                raise AdapterError(
                    f"{adapter.name} is {two}, {other.name} is {one}: names are kept as they are, so both must be of "
                    f"one family{_converter(one.name, two.name)}"
                )
            if not two.single:
                continue
            common = adapter.modules.keys() & other.modules.keys()
            if not common and None not in (one.names, two.names):
                warnings.warn(
                    f"{adapter.name} and {other.name} have no module in common: are they for one model?", stacklevel=4
                )
            for module in common:
                one_key, two_key = other.keys(module)[0], adapter.keys(module)[0]
                if one_key != two_key:
                    raise AdapterError(f"{adapter.name} spells {two_key} what {other.name} spells {one_key}")


def _converter(one: str, two: str) -> str:
    """What converts, after a semicolon; empty where nothing does."""
    known = (KOHYA, PEFT_NAMED, DIFFUSERS, MLX.name, PEFT.name)
    kinds = frozenset(next(kind for kind in known if name.startswith(kind)) for name in (one, two))
    return f"; {_CONVERTERS[kinds]}" if kinds in _CONVERTERS else ""
