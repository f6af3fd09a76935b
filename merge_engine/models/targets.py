"""Which tensor of a base model each module is merged into, and which way round."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge_engine.errors import ModelError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import Adapter, Module
from merge_engine.formats.biases import BIAS
from merge_engine.formats.checkpoint import FLOATS, Checkpoint, is_head
from merge_engine.formats.families import MLX, PEFT
from merge_engine.models.experts import stores_transposed
from merge_engine.models.vocabulary import in_layer, vocabulary_keys


@dataclass(frozen=True)
class Target:
    """The tensor of a base model that a module is merged into."""

    stored: StoredTensor
    transposed: bool  # a delta [M, N] goes into a weight [N, M]

    def matrix(self, tensor: Tensor) -> Tensor:
        """The tensor as [M, N], without a copy: a vector is one row, a convolution has its kernels in the columns."""
        flat = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
        return flat.t() if self.transposed else flat

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: a tensor of the base's shape."""
        return (matrix.t() if self.transposed else matrix).reshape(self.stored.shape)


def check_goes_into_a_base(adapter: Adapter) -> None:
    """Raise ModelError, which names what does it, for an adapter whose names need not be those of the base."""
    if adapter.family.name != PEFT.name:
        way = "mlx_lm.fuse" if adapter.family.name == MLX.name else "fuse_lora of diffusers' pipelines"
        raise ModelError(f"{adapter.name} is {adapter.family}, which is not merged into a base here; {way} does that")


def targets_of_adapters(base: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, Target]:
    """The weight ``<module>.weight`` of every module that an adapter has, checked against its delta.

    The delta [dim, num] of an embedding [num, dim] is added transposed, as is that of transformers' Conv1D [in, out]
    (fan_in_fan_out); that of a convolution [out, in, ...] has the kernels in its columns.

    Raises ModelError: there is no such tensor, it has another shape or is quantized, or it is shared with another
    layer: an adapter of one of two tied layers would change both. (PEFT's merge_and_unload changes both, and warns.)
    """
    targets: dict[str, Target] = {}
    for adapter in adapters:
        check_goes_into_a_base(adapter)
        flag = bool(adapter.config.get("fan_in_fan_out"))
        for name, module in adapter.modules.items():
            stored = _find(base, adapter, name)
            _check_untied(base, adapter, name, module, stored.key)
            transposed = _is_transposed(base, adapter, module, stored, flag)
            if targets.setdefault(name, Target(stored, transposed)).transposed != transposed:
                raise ModelError(f"{adapter.name}: fan_in_fan_out of {name} is {flag}, wanted as in the other adapters")
    return targets


def targets_of_models(base: Checkpoint, models: Sequence[Checkpoint], adapted: dict[str, Target]) -> dict[str, Target]:
    """Every floating-point tensor of the base that a model has too, by module: its key without ``.weight``.

    Of tied tensors one is merged. adapted: the targets of adapters, which are taken as they are.
    """
    targets = {
        key.removesuffix(".weight"): Target(stored, transposed=False)
        for key, stored in base.tensors.items()
        if stored.dtype in FLOATS and key not in base.twins and 0 not in stored.shape
        if any(key in model.tensors for model in models)
    }
    return targets | adapted


def _find(base: Checkpoint, adapter: Adapter, name: str) -> StoredTensor:
    key = name if adapter.modules[name].kind == BIAS else f"{name}.weight"
    if key not in base.tensors:
        if is_head(key) and base.ties_embeddings:
            raise ModelError(_tied(base, adapter, name))
        like = [other for other in base.tensors if key.endswith(f".{other}") or other.endswith(f".{key}")]
        hint = f"; it has {like[0]}: save it by the class that the adapter was trained on" if like else ""
        raise ModelError(f"{adapter.name}: wanted tensor {key} in {base.name} for module {name}, got none{hint}")
    stored = base.tensors[key]
    if stored.dtype not in FLOATS:
        raise ModelError(f"{base.name}: {key} is {stored.dtype}, wanted a floating-point weight to merge into")
    return stored


def _check_untied(base: Checkpoint, adapter: Adapter, name: str, module: Module, key: str) -> None:
    if key in base.twins or key in base.twins.values():
        raise ModelError(_tied(base, adapter, name))
    if base.ties_embeddings and (is_head(key) or (module.kind == "embedding" and in_vocabulary(base, key))):
        raise ModelError(_tied(base, adapter, name))


def _tied(base: Checkpoint, adapter: Adapter, name: str) -> str:
    return (
        f"{adapter.name}: {name} is tied to another layer of {base.name}, which the adapter does not mean to change; "
        "wanted a base saved untied (tie_word_embeddings false, lm_head.weight in its files)"
    )


def in_vocabulary(base: Checkpoint, key: str) -> bool:
    return key in vocabulary_keys(base)


def _is_transposed(base: Checkpoint, adapter: Adapter, module: Module, stored: StoredTensor, flag: bool) -> bool:
    """Whether the weight is [N, M] for a delta [M, N]. For a square weight, other layers decide, else the flag.

    The flag fan_in_fan_out does not do for all: an adapter has one, and PEFT sets it as its last layer needs it.
    """
    plain, turned = (module.rows, module.columns), (module.columns, module.rows)
    if module.kind == BIAS:
        fits = stored.shape == (module.columns,)
    elif module.kind == "conv":
        fits = stored.shape == (module.rows, *module.a_shape[1:])
    else:
        fits = stored.shape in ((turned,) if module.kind == "embedding" else (plain, turned))
    if not fits:
        delta = turned if module.kind == "embedding" else plain
        raise ModelError(
            f"{adapter.name}: the delta of {module.name} is {list(delta)}, wanted {list(stored.shape)} "
            f"as {stored.key} in {base.name}" + (": vocabularies differ" if in_vocabulary(base, stored.key) else "")
        )
    if module.expert is not None and plain == turned:
        return module.expert.count > 1 and stores_transposed(base)  # PEFT turns no single matrix
    if module.kind != "linear" or plain != turned:
        return module.kind == "embedding" or (module.kind == "linear" and stored.shape != plain)
    beside = [other for other in adapter.modules.values() if in_layer(other.name) == in_layer(module.name)]
    seen = {
        base.tensors[f"{other.name}.weight"].shape != (other.rows, other.columns)
        for other in beside
        if other.kind == "linear"
        and other.expert is None
        and other.rows != other.columns
        and f"{other.name}.weight" in base.tensors
    }
    seen = seen or _layouts(base, in_layer(module.name))
    if len(seen) > 1:
        raise ModelError(
            f"{adapter.name}: {module.name} is square, and layers beside it in {base.name} are laid out both ways; "
            "wanted an adapter without it"
        )
    return seen.pop() if seen else flag


def _layouts(base: Checkpoint, inside: bool) -> set[bool]:
    """Whether weights are [in, out], as the lengths of biases show. inside: those in numbered layers, or all others."""
    found = set()
    for key, bias in base.tensors.items():
        weight = base.tensors.get(f"{key.removesuffix('.bias')}.weight") if key.endswith(".bias") else None
        if weight is not None and len(weight.shape) == 2 and len(set(weight.shape)) == 2 and in_layer(key) == inside:
            found |= {turned for turned in (False, True) if bias.shape == (weight.shape[turned],)}
    return found
