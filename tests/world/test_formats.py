"""What holds for every format: text and facts convert both ways, prompts end at a token, names do not leak.

Hypothesis draws seeds only; the world's own Rng does the rest. With WORLD_EXAMPLES=2000 in the environment
each format is tried on 2000 seeds per split.
"""

from __future__ import annotations

import json
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from refimpl.paths import data_file
from refimpl.world.documents import people
from refimpl.world.formats import BY_NAME, FORMATS
from refimpl.world.groups_dialects import GROUPS
from refimpl.world.lexicon import FIRST_NAMES
from refimpl.world.mix import ROW, SHARES
from refimpl.world.names import names
from refimpl.world.rng import Rng
from refimpl.world.stories import cut_opening
from refimpl.world.tokens import FREE, MARKS, RESERVED, ROLES

EXAMPLES = int(os.environ.get("WORLD_EXAMPLES", "20"))
WITH_ROLES = {
    "dialogue", "dialogue_qa", "dialogue_summary", "dialogue_attributes", "pronoun_rewrite", "instruction",
}  # fmt: skip
WITH_MARKS = {"triples", "mem_write", "mem_read", "mem_answer", "mem_inline", "mem_inline_write"}
LONG = {"key_value"}  # formats with a few documents that do not fit into a row
SAMPLE = 60  # documents per format and split where text is tokenised

each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
each_split = pytest.mark.parametrize("split", ["train", "eval"])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(data_file("models", "tokenizer.json")))


@pytest.fixture(scope="module")
def texts() -> dict[tuple[str, str], list[str]]:
    """Documents of every format and split."""
    found = {}
    for form in FORMATS:
        for split in ("train", "eval"):
            rng = Rng("test formats", form.name, split)
            found[form.name, split] = [form.document(rng, split) for _ in range(SAMPLE)]
    return found


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


@pytest.fixture(scope="module")
def lengths(texts, tokenizer) -> dict[tuple[str, str], list[int]]:
    """Tokens of each of these documents."""
    return {key: [len(ids) for ids in encode(tokenizer, documents)] for key, documents in texts.items()}


@each_split
@each_format
def test_text_and_facts_convert_both_ways(form, split):
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**63))
    def check(seed: int) -> None:
        facts = form.sample(Rng("hypothesis", seed), split)
        assert json.loads(json.dumps(facts)) == facts, "facts must survive JSON"
        for surface in ("a", "b"):  # other words, same facts
            text = form.render(facts, Rng("surface", surface, seed))
            assert form.parse(text) == facts, text
            assert text == form.render(facts, Rng("surface", surface, seed)), "render draws from rng only"
            assert text.endswith("\n") and not text.endswith("\n\n") and text == text.lstrip()
            if form.boundary is not None and form.boundary in text:
                prompt, completion = form.prompt(text)
                assert prompt + completion + "\n" == text
                assert prompt.endswith(form.boundary) and re.match(r" \S", completion), completion
            assert "<|reserved_" not in text and "<|free_" not in text

    check()


def test_the_boundary_occurs_unless_nothing_is_asked(texts):
    for form in FORMATS:
        if form.boundary is not None:
            share = sum(form.boundary in t for split in ("train", "eval") for t in texts[form.name, split])
            # a document about known people may hold no question
            assert share == 2 * SAMPLE if form.name != "known_people" else share > SAMPLE


def test_prompt_and_completion_are_tokenised_alike_together_and_apart(texts, tokenizer):
    for (name, split), documents in texts.items():
        form = BY_NAME[name]
        if form.boundary is not None:
            cut = [form.prompt(t) for t in documents if form.boundary in t]
        elif name in ("story", "story_tagged", "story_reader"):
            cut = [cut_opening(t) for t in documents]
        else:
            continue
        prompts, completions = encode(tokenizer, [p for p, _ in cut]), encode(tokenizer, [c for _, c in cut])
        for together, p, c, pair in zip(encode(tokenizer, [p + c for p, c in cut]), prompts, completions, cut,
                                        strict=True):  # fmt: skip
            assert together == p + c, (name, split, pair)
        # the line end after an answer is a token of its own, so that greedy decoding can stop there
        for with_end, c in zip(encode(tokenizer, [c + "\n" for _, c in cut]), completions, strict=True):
            assert with_end[:-1] == c, (name, split)


def test_documents_fit_into_a_row(lengths):
    for (name, split), found in lengths.items():
        too_long = sum(n > ROW - 1 for n in found)
        assert too_long <= (0.05 * SAMPLE if name in LONG else 0), (name, split, too_long)


def test_special_tokens_stay_where_they_belong(texts):
    never = (ROLES[0], ROLES[1], *FREE, *RESERVED)
    for (name, split), documents in texts.items():
        blob = "".join(documents)
        assert not [token for token in never if token in blob], (name, split)
        assert any(token in blob for token in ROLES) == (name in WITH_ROLES), (name, split)
        assert any(token in blob for token in MARKS) == (name in WITH_MARKS), (name, split)


def test_shares_cover_all_formats_but_the_known_people():
    assert set(SHARES) == set(BY_NAME) - {"known_people"}  # these have a schedule of their own
    assert all(share > 0 for share in SHARES.values()) and 40 < sum(SHARES.values()) < 70
    assert (
        sum(SHARES[name] for name in ("needle", "key_value", "mqar", "repeat", "echo", "reverse_lookup"))
        >= 10
    )  # interp E7


def test_sort_is_at_least_two_per_cent_of_the_documents(lengths):
    """Interp E8; documents about known people (5 per cent of tokens) included."""
    mean = {name: sum(lengths[name, "train"]) / SAMPLE + 1 for name in BY_NAME}
    documents = {name: share / mean[name] for name, share in {**SHARES, "known_people": 5.0}.items()}
    assert documents["sort"] / sum(documents.values()) >= 0.02


def test_names_of_training_and_evaluation_are_disjoint(texts):
    train, evaluation = set(names("train")), set(names("eval"))
    assert len(train) >= 3000 and len(evaluation) >= 400
    assert not train & evaluation and not (train | evaluation) & set(FIRST_NAMES)
    invented = {"train": set(people("train")), "eval": set(people("eval"))}
    seen = {"train": 0, "eval": 0}
    for (name, split), documents in texts.items():
        here = set(re.findall(r"[A-Z][a-z]+", " ".join(documents))) - set(GROUPS)  # a group is no person
        assert not here & invented["eval" if split == "train" else "train"], (name, split)
        seen[split] += len(here & invented[split])
    assert min(seen.values()) > 300


@each_format
def test_foreign_text_is_refused(form):
    for text in ("Nothing of the kind.\n", "<|reserved_0|>\n", "Question: Why?\nAnswer: because\n"):
        with pytest.raises(ValueError):
            form.parse(text)


@each_format
def test_empty_text_is_refused(form):
    with pytest.raises(ValueError):
        form.parse("")


def test_a_prompt_of_another_format_is_refused():
    with pytest.raises(ValueError, match="no 'Answer:' in it"):
        BY_NAME["needle"].prompt("Once upon a time.\n")
    with pytest.raises(ValueError, match="no prompt boundary"):
        BY_NAME["story"].prompt("Once upon a time.\n")
