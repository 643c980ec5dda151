"""The frozen tokenizer: ids of the special tokens, lengths of names and values, any text back unchanged."""

from __future__ import annotations

import json

import token_table
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.models import tokenizer_from
from refimpl.paths import data_file
from refimpl.world.names import known_people, names
from refimpl.world.tokens import MARKS, SPECIAL, VOCAB_SIZE, train_tokenizer

TOKENIZER = tokenizer_from(data_file("models", "tokenizer.json"))
IDS = {
    "<|endoftext|>": 0, "<|pad|>": 1, "<|user|>": 2, "<|assistant|>": 3, "<|system|>": 4, "<|sep|>": 5,
    "({": 6, "-->": 7, "})": 8, ">>": 9, "[MEM_WRITE{": 10, "[MEM_READ{": 11, "}]": 12,
    **{f"<|reserved_{i}|>": 16 + i for i in range(16)},
}  # fmt: skip


def lengths(words) -> set[int]:
    return {len(ids) for ids in TOKENIZER([f" {word}" for word in words])["input_ids"]}


def test_4096_ids():
    vocabulary = TOKENIZER.get_vocab()
    assert len(TOKENIZER) == VOCAB_SIZE == 4096
    assert sorted(vocabulary.values()) == list(range(4096))


def test_special_tokens_have_their_ids_wherever_they_stand():
    for token, i in IDS.items():
        assert TOKENIZER.convert_tokens_to_ids(token) == i == SPECIAL.index(token)
        assert TOKENIZER(token)["input_ids"] == [i]
        inside = TOKENIZER(f"a{token}b")["input_ids"]
        assert inside == [*TOKENIZER("a")["input_ids"], i, *TOKENIZER("b")["input_ids"]]


def test_ids_of_the_models_configuration():
    assert TOKENIZER.bos_token_id == TOKENIZER.eos_token_id == 0 and TOKENIZER.pad_token_id == 1


def test_role_tokens_are_left_out_on_request_and_marks_are_text():
    ids = TOKENIZER("<|user|> Hi ({ there }) now<|endoftext|>")["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == " Hi ({ there }) now"
    for mark in MARKS:
        assert TOKENIZER.decode(TOKENIZER(mark)["input_ids"], skip_special_tokens=True) == mark


def test_pools_are_single_tokens():
    pools = token_table.pools()
    assert set(token_table.SINGLE) >= {"FIRST_NAMES", "SURNAMES", "TOWNS", "JOBS", "COMPANIES", "SCHOOLS",
                                       "OBJECTS", "ANIMALS", "FOODS", "CODES"}  # fmt: skip
    for name in token_table.SINGLE:
        assert lengths(pools[name]) == {1}, name
        assert 30 <= len(pools[name]) <= 256, name


def test_names_are_two_or_three_tokens_with_equal_shares():
    assert lengths(names("train")) == lengths(names("eval")) == {2, 3}
    assert lengths(known_people()) == {2}
    share = []
    for split in ("train", "eval"):
        found = TOKENIZER([f" {name}" for name in names(split)])["input_ids"]
        share.append(sum(len(ids) == 2 for ids in found) / len(found))
    assert abs(share[0] - share[1]) < 0.05  # length must not tell a training name from an evaluation name


def test_evaluation_names_are_made_of_tokens_of_training_names():
    train = TOKENIZER([f" {name}" for name in names("train")])["input_ids"]
    evaluation = TOKENIZER([f" {name}" for name in names("eval")])["input_ids"]
    known = {i for ids in train for i in ids}
    strange = sum(not known.issuperset(ids) for ids in evaluation)
    assert strange <= 0.01 * len(evaluation)  # a token that only an evaluation name has would tell it apart


def test_nothing_is_added():
    for text in ("", "a", " a", "\n", "Once upon a time."):
        both = [TOKENIZER(text)["input_ids"], TOKENIZER.encode(text, add_special_tokens=True)]
        assert both[0] == both[1] and not set(both[0]) & {0, 1}


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=80))
def test_any_text_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([*IDS, " ", "\n", "word", " word", "é", "  ", "."]), max_size=12))
def test_any_text_with_special_tokens_comes_back(pieces):
    text = "".join(pieces)
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=False) == text


def test_training_is_deterministic_and_keeps_the_ids():
    texts = ["the cat sat on the mat. " * 3, "a dog ({ and }) a frog"] * 4
    first = train_tokenizer(texts)
    assert first == train_tokenizer(texts)
    assert IDS.items() <= {t["content"]: t["id"] for t in json.loads(first)["added_tokens"]}.items()


def test_the_table_is_up_to_date():
    stored = data_file("world", "tokens.md").read_text(encoding="utf-8")
    assert token_table.generate() == stored, "data/world/tokens.md is old: run python tools/token_table.py"
