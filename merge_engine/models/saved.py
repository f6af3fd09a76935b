"""Layers that adapters hold whole (modules_to_save, saved embeddings), and what becomes of them in a base model."""

from collections.abc import Mapping, Sequence

from merge_engine.errors import ModelError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import KEY_PREFIX, Adapter
from merge_engine.formats.checkpoint import Checkpoint, is_head
from merge_engine.models.targets import Target, in_vocabulary
from merge_engine.models.vocabulary import Union, token_keys, tokens


def saved_tensors(base: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, StoredTensor]:
    """What adapters hold whole (modules_to_save, and embeddings saved beside them), by the key it replaces.

    That all adapters have the same is checked by the plan. Copies of adapted base weights change nothing.
    """
    saved = {}
    for adapter in adapters:
        for key, stored in held_whole(adapter).items():
            if key.endswith((".base_layer.weight", ".base_layer.bias")):
                continue
            if key.endswith("trainable_tokens_delta"):
                raise ModelError(f"{adapter.name}: {stored.key}: trained tokens cannot be merged into a base model")
            if key not in base.tensors:
                raise ModelError(f"{adapter.name}: {stored.key} would replace {key}, which {base.name} has not")
            want = base.tensors[key].shape
            if stored.shape != want:
                raise ModelError(
                    f"{adapter.name}: {key} is {list(stored.shape)}, wanted {list(want)} as in {base.name}"
                    + (": vocabularies differ" if stored.shape[1:] == want[1:] else "")
                )
            if key in base.twins or key in base.twins.values() or (base.ties_embeddings and in_vocabulary(base, key)):
                raise ModelError(f"{adapter.name}: {key} is tied to another layer of {base.name}; untie them first")
            saved[key] = stored
    return saved


def saved_vocabulary(base: Checkpoint, adapter: Adapter) -> Checkpoint | None:
    """All the layers with a row a token, as a model of these alone, if an adapter holds them whole.

    PEFT saves them beside the factors where tokens were added. Of tied layers the second is left out.

    Raises ModelError: tied layers differ; or other layers are held whole too, or the same ones adapted.
    """
    wanted = [key for key in token_keys(base) if key not in base.twins]
    held = held_whole(adapter)
    if not held.keys() >= set(wanted):
        return None
    saved = {key: held.pop(key) for key in wanted}
    for key in [key for key in held if key in base.twins or (is_head(key) and base.ties_embeddings)]:
        first = base.twins.get(key, wanted[0])
        if not held[key].same_as(saved[first]):
            raise ModelError(f"{adapter.name}: {key} is tied to {first} in {base.name}, wanted the same rows in both")
        del held[key]
    others = [key for key in held if not key.endswith((".base_layer.weight", ".base_layer.bias"))]
    others += [key for key in saved if key.removesuffix(".weight") in adapter.modules]
    if others:
        raise ModelError(f"{adapter.name}: wanted only {', '.join(wanted)} held whole and not adapted, got {others[0]}")
    return Checkpoint(adapter.name, adapter.source, adapter.path, {}, saved)


def held_whole(adapter: Adapter) -> dict[str, StoredTensor]:
    """What an adapter holds whole, by the key it replaces.

    Of a resized embedding in modules_to_save, PEFT saves both the original and a copy of what it saves anyway.
    """
    held = {key.removeprefix(KEY_PREFIX): stored for key, stored in adapter.extras.items()}
    for key, stored in list(held.items()):
        saved = held.get(key.replace(".modules_to_save.", "."))
        if ".original_module." in key or (".modules_to_save." in key and saved is not None and stored.same_as(saved)):
            del held[key]
    return held


def check_tokens(base: Checkpoint, adapters: Sequence[Adapter], targets: Mapping[str, Target], union: Union) -> None:
    """Raise ModelError where an adapter changes rows of the vocabulary and has tokens that the base lacks.

    Its rows are the base's, whatever the strings: a token of its own would have a row of the base's padding.
    """
    for adapter in adapters:
        keys = {targets[name].stored.key for name in adapter.modules} | saved_tensors(base, [adapter]).keys()
        added = [token for token in tokens(adapter.path) if token not in union.tokens or token in union.added]
        if added and keys & union.keys:
            raise ModelError(
                f"{adapter.name}: it changes {min(keys & union.keys)} and has tokens that {base.name} has not "
                f"({', '.join(added[:8])}); wanted {', '.join(token_keys(base))} saved whole in it"
            )
