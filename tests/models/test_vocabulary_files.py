"""Tokenizer files: which vocabularies can be united, and which are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from toy_models import weights_of
from toy_vocabularies import KEYS, WIDTH, numbered, rewrite, save_toy, union_folder, write_tokenizer

from merge_engine.errors import MergeError, ModelError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.models.vocabulary import unite


def no_tokenizer(base, chat):
    (chat / "tokenizer.json").unlink()


def no_tokenizer_in_the_base(base, chat):
    (base / "tokenizer.json").unlink()


def torn(base, chat):
    (chat / "tokenizer.json").write_text('{"model": {')


def no_object(base, chat):
    (chat / "tokenizer_config.json").write_text("[]")


def no_content(base, chat):
    rewrite(chat, "tokenizer.json", added_tokens=[{"id": 3}])


def no_number(base, chat):
    rewrite(chat, "added_tokens.json", **{"<z>": "3"})


def no_tokens(base, chat):
    write_tokenizer(chat, {})


def too_many(base, chat):
    write_tokenizer(chat, numbered("to", "be", "or", "<a>", "<z>"))


def too_many_in_the_base(base, chat):
    write_tokenizer(base, numbered("to", "be", "or", "not", "even"))


def two_at_one(base, chat):
    rewrite(chat, "added_tokens.json", **{"<z>": 1})


def one_at_two(base, chat):
    rewrite(chat, "added_tokens.json", be=3)


def other_words(base, chat):
    write_tokenizer(chat, numbered("to", "be", "or", "not"))


def other_rules(base, chat):
    write_tokenizer(chat, numbered("to", "be", "or", "<a>"), continuing_subword_prefix="##")


def a_hole(base, chat):
    write_tokenizer(base, {"to": 0, "be": 1, "or": 3})


def no_embedding(base, chat):
    rewrite(base, "config.json", vocab_size=77)


def uneven(base, chat):
    save_file({**weights_of(chat), "lm_head.weight": torch.zeros(5, WIDTH)}, chat / "model.safetensors")


def narrow(base, chat):
    save_file({**weights_of(chat), KEYS[0]: torch.zeros(4, WIDTH + 1)}, chat / "model.safetensors")


def far_away(base, chat):
    write_tokenizer(chat, numbered("to", "be", "or") | {"<z>": 2**40})


def no_such_piece(base, chat):
    pieces = [["to", 0.0], ["be", 0.0], ["or", 0.0]]
    rewrite(chat, "tokenizer.json", model={"type": "Unigram", "vocab": pieces, "unk_id": 9})


def no_list(base, chat):
    (chat / "special_tokens_map.json").write_text('{"additional_special_tokens": 5}')


def nothing(base, chat):
    save_file({"model.norm.weight": torch.zeros(WIDTH)}, chat / "model.safetensors")


def not_finite(base, chat):
    tensors = weights_of(chat)
    tensors["lm_head.weight"][3, 1] = float("nan")
    save_file(tensors, chat / "model.safetensors")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_tokenizer, "chat: {chat} has no tokenizer.json, wanted one to align its tokens with those of others"),
        (no_tokenizer_in_the_base, "base: {base} has no tokenizer.json, wanted one to align"),
        (torn, "chat: its tokenizer files cannot be read: JSONDecodeError: "),
        (no_object, "chat: its tokenizer files cannot be read: ValueError: tokenizer_config.json holds a list, wanted"),
        (no_content, "chat: its tokenizer files cannot be read: KeyError: 'content'"),
        (no_number, "chat: its tokenizer files cannot be read: ValueError: '<z>' has the index '3'"),
        (
            far_away,
            "chat: its tokenizer files cannot be read: ValueError: '<z>' has the index 1099511627776, wanted one",
        ),
        (no_such_piece, "chat: its tokenizer files cannot be read: IndexError: list index out of range"),
        (no_list, "chat: its tokenizer files cannot be read: ValueError: additional_special_tokens of special_tokens_"),
        (no_tokens, "chat: tokenizer.json has no tokens"),
        (too_many, "chat: its tokenizer has <z> at 4, wanted an index below 4, the rows of "),
        (too_many_in_the_base, "base: its tokenizer has even at 4, wanted an index below 4, the rows of "),
        (two_at_one, "chat: its tokenizer has both be and <z> at 1"),
        (one_at_two, "chat: its tokenizer has be at 1 and at 3"),
        (
            other_words,
            "chat: its tokenizer's model has tokens that base does not have (not), wanted them among its added ",
        ),
        (other_rules, "chat: the continuing_subword_prefix of its tokenizer's model are not those of base: wanted "),
        (a_hole, "base: its tokenizer has 3 tokens and the highest index 3, wanted no index free below the tokens to "),
        (no_embedding, "base: wanted an embedding of vocab_size rows as config.json says, got none"),
        (uneven, "chat: "),
        (narrow, "chat: model.embed_tokens.weight is [4, 4], wanted [4, 3] as in base"),
        (nothing, "chat: wanted tensor "),
        (not_finite, "chat: tensor lm_head.weight in {chat}/model.safetensors holds NaN"),
    ],
)
def test_vocabularies_that_cannot_be_united(toys, spoil, message):
    base, (chat, *_) = toys
    spoil(base, chat)
    before = {path.name for path in base.parent.iterdir()}
    with pytest.raises(MergeError) as error:
        union_folder((base, [chat]))
    assert str(error.value).startswith(message.format(base=base, chat=chat)) and "\n" not in str(error.value)
    assert {path.name for path in base.parent.iterdir()} == before
    if spoil is uneven:
        assert "rows, wanted" in str(error.value)


def test_rules_of_older_and_newer_files_are_one(tmp_path):
    """Merges as strings and as pairs, and what is off left out or said; scores count, indices do not."""

    def saved(name, model):
        folder = save_toy(tmp_path / name, {}, 4)
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
        return open_checkpoint(folder)

    old = saved("old", {"type": "BPE", "vocab": numbered("a", "b", "ab"), "merges": ["a b"]})
    new = {"type": "BPE", "vocab": numbered("b", "ab", "a"), "merges": [["a", "b"]], "ignore_merges": False}
    other = saved("new", {**new, "dropout": 0.1, "unk_token": None})
    union = unite(old, [other])
    assert union.places[other].tolist() == [1, 2, 0, 3] and not union.added
    with pytest.raises(ModelError, match=r"^other: the merges of its tokenizer's model are not those of old"):
        unite(old, [saved("other", {**new, "merges": [["b", "a"]]})])
    pieces = [["<unk>", 0.0], ["a", -1.5], ["b", -2.0]]
    scored = saved("scored", {"type": "Unigram", "unk_id": 0, "vocab": pieces})
    turned = saved("turned", {"type": "Unigram", "unk_id": 2, "vocab": pieces[::-1]})
    assert unite(scored, [turned]).places[turned].tolist() == [2, 1, 0, 3]
    with pytest.raises(ModelError, match=r"^rescored: the vocab of its tokenizer's model are not those of scored"):
        unite(scored, [saved("rescored", {"type": "Unigram", "unk_id": 0, "vocab": [*pieces[:2], ["b", -3.0]]})])
