"""Layers that adapters save whole (modules_to_save, embeddings), and the tensors of the base that they replace."""

from collections.abc import Mapping, Sequence

from merge_engine.errors import ModelError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import KEY_PREFIX, TOKENS, Adapter, is_base_copy
from merge_engine.formats.checkpoint import Checkpoint, is_head
from merge_engine.formats.extras import carried_over
from merge_engine.models.targets import Target, in_vocabulary
from merge_engine.models.vocabulary import Union, token_keys, tokens


def saved_tensors(base: Checkpoint, adapters: Sequence[Adapter], saved: str | None = None) -> dict[str, StoredTensor]:
    """{key of the base: the tensor that replaces it}, of all layers that adapters save whole.

    saved: which of them, where they differ between adapters; see `extras.carried_over`. Copies of adapted base weights
    are left out.

    Raises ModelError where the base lacks the key, has another shape there, or ties it to another layer, and for
    trained tokens; AdapterError where they differ and saved does not say what to do.
    """
    owners = []
    for adapter in adapters:
        held = {
            key: stored
            for key, stored in held_whole(adapter).items()
            if not is_base_copy(key) and not stored.key.endswith(TOKENS)
        }
        owners.append((adapter.name, held))
        for key, stored in held.items():
            if key not in base.tensors:
                raise ModelError(f"{adapter.name}: {stored.key} would replace {key}, which {base.name} does not have")
            want = base.tensors[key].shape
            if stored.shape != want:
                raise ModelError(
                    f"{adapter.name}: {key} is {list(stored.shape)}, wanted {list(want)} as in {base.name}"
                    + (": vocabularies differ" if stored.shape[1:] == want[1:] else "")
                )
            if key in base.twins or key in base.twins.values() or (base.ties_embeddings and in_vocabulary(base, key)):
                raise ModelError(f"{adapter.name}: {key} is tied to another layer of {base.name}; untie them first")
    return carried_over(owners, saved)


def saved_vocabulary(base: Checkpoint, adapter: Adapter) -> Checkpoint | None:
    """A model of the layers with one row for each token, if an adapter saves all of them whole; else None.

    PEFT saves them beside the factors where tokens were added. Of two tied layers the second is left out.

    Raises ModelError: tied layers differ, other layers are saved whole as well, or the same layers are also adapted.
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
    others = [key for key in held if not is_base_copy(key)]
    others += [key for key in saved if key.removesuffix(".weight") in adapter.modules]
    if others:
        raise ModelError(f"{adapter.name}: wanted only {', '.join(wanted)} held whole and not adapted, got {others[0]}")
    return Checkpoint(adapter.name, adapter.source, adapter.path, {}, saved)


def held_whole(adapter: Adapter) -> dict[str, StoredTensor]:
    """{key of the base: tensor} of what an adapter saves whole.

    For a resized embedding in modules_to_save, PEFT also saves the original and a second copy: both are left out.
    """
    held = {key.removeprefix(KEY_PREFIX): stored for key, stored in adapter.extras.items()}
    for key, stored in list(held.items()):
        saved = held.get(key.replace(".modules_to_save.", "."))
        if ".original_module." in key or (".modules_to_save." in key and saved is not None and stored.same_as(saved)):
            del held[key]
    return held


def check_tokens(base: Checkpoint, adapters: Sequence[Adapter], targets: Mapping[str, Target], union: Union) -> None:
    """Raise ModelError where an adapter changes embedding or head and its tokenizer has tokens that the base lacks.

    An adapter's rows are those of the base, by index: the row of such a token would be padding there.
    """
    for adapter in adapters:
        keys = {targets[name].stored.key for name in adapter.modules} | saved_tensors(base, [adapter]).keys()
        added = [token for token in tokens(adapter.path) if token not in union.tokens or token in union.added]
        if added and keys & union.keys:
            raise ModelError(
                f"{adapter.name}: it changes {min(keys & union.keys)} and has tokens that {base.name} does not have "
                f"({', '.join(added[:8])}); wanted {', '.join(token_keys(base))} saved whole in it"
            )
