"""Facts to text and back: relations, passages, questions, and every document format."""

import json
from collections import Counter

import pytest

from refimpl.world.document_formats import COUNTERFACTUAL_PEOPLE, FORMATS
from refimpl.world.documents import (
    UNKNOWN,
    jaccard,
    near_duplicate,
    people,
    read_passage,
    read_question,
    solve,
    write_passage,
    write_question,
)  # fmt: skip
from refimpl.world.lexicon import TOWNS
from refimpl.world.names import known_people
from refimpl.world.relations import (
    ASKED,
    DATES,
    KNOWN_ATTRIBUTES,
    RELATIONS,
    TYPES,
    ask,
    ask_when,
    ask_who,
    can_ask_who,
    clozes,
    known_facts,
    parse_path,
    parse_sentence,
    parse_when,
    phrase,
    read_sentence,
    state,
)  # fmt: skip
from refimpl.world.rng import Rng

BY_NAME = {f.name: f for f in FORMATS}
QA = [f for f in FORMATS if f.boundary == "Answer:"]


def _subject(relation, split, rng):
    if TYPES[relation.subject]:
        return rng.choice(TYPES[relation.subject])
    return rng.choice(
        (rng.choice(known_people()), rng.choice(people(split)), f"the baker of {rng.choice(TOWNS)}")
    )


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_template_reads_back(name, split):
    relation, rng = RELATIONS[name], Rng("templates", name, split)
    held = split == "eval"
    for _ in range(150):
        s, v = _subject(relation, split, rng), rng.choice(relation.values or people(split))
        d = rng.choice(DATES) if relation.kind == "dated" else ""
        fact = (s, name, v) + ((d,) if d else ())
        assert read_sentence(state(name, s, v, rng, split, d)) == (fact, held)
        if not relation.asks:
            continue
        for paraphrase in (False, True):
            assert parse_path(ask(name, s, rng, split, paraphrase)) == ((s, name), held)
        if can_ask_who(name):
            assert parse_path(ask_who(name, v, rng, split)) == ((v, "~" + name), held)
        if relation.when:
            assert parse_when(ask_when(name, s, v, rng, split)) == ((s, name, v), held)
        if relation.phrase:
            assert parse_path(ask("likes", phrase(name, s, rng, split), rng, split)) == (
                (s, name, "likes"),
                held,
            )


def test_counts_of_relations_and_templates():
    assert len(ASKED) >= 12
    assert {r.kind for r in RELATIONS.values()} == {"functional", "symmetric", "many", "dated"}
    for name in ASKED:
        r = RELATIONS[name]
        assert len(r.states) >= 6 and len(set(r.states)) == len(r.states)
        assert len(r.asks) + len(r.paraphrases) >= 4
        assert any(t.startswith("{s}") for t in r.states) and any(not t.startswith("{s}") for t in r.states)
    for name in KNOWN_ATTRIBUTES:  # facts can be prompted in training and in held-out wording
        assert clozes(name, "Adam Barker", RELATIONS[name].values[0], "train")
        assert clozes(name, "Adam Barker", RELATIONS[name].values[0], "eval")


def test_known_facts_are_complete_and_type_uniform():
    facts = known_facts()
    assert set(facts) == {(p, r) for p in known_people() for r in KNOWN_ATTRIBUTES}
    for r in KNOWN_ATTRIBUTES:
        count = Counter(v for (_, relation), v in facts.items() if relation == r)
        assert set(count) == set(RELATIONS[r].values) and max(count.values()) - min(count.values()) <= 1


@pytest.mark.parametrize(
    "text", ["", "Balbert lives.", "Balbert lives in Paris.", "Balbert is an baker.", "lives in"]
)
def test_foreign_text_is_refused(text):
    with pytest.raises(ValueError, match="text"):
        parse_sentence(text)


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_format_round_trip(fmt, split):
    for i in range(200):
        facts = fmt.sample(Rng(fmt.name, split, i), split)
        assert json.loads(json.dumps(facts)) == facts
        for j in range(2):  # other wording, same facts
            text = fmt.render(facts, Rng("surface", i, j))
            assert text.endswith("\n") and fmt.parse(text) == facts
        if fmt.boundary:
            assert fmt.prompt(text)[1].startswith(" ")


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_format_refuses_other_text(fmt):
    text = fmt.document(Rng(1))
    for bad in ("", "Once upon a time.\n", text[:-1], text.replace(".", "!", 1), "\n" + text):
        with pytest.raises(ValueError):
            fmt.parse(bad)


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_names_of_the_other_split_never_occur(fmt, split):
    other = set(people("train" if split == "eval" else "eval"))
    text = " ".join(fmt.document(Rng("names", i), split) for i in range(150))
    assert not other & set(text.replace(".", " ").replace(",", " ").replace("?", " ").split())


@pytest.mark.parametrize("fmt", QA, ids=lambda f: f.name)
def test_answers_are_the_only_solutions(fmt):
    for i in range(300):
        facts = fmt.sample(Rng("answers", fmt.name, i), "train")
        flat = [f for p in facts["passages"] for f in p]
        assert facts["qa"]
        for question, answer in facts["qa"]:
            assert (solve(flat, question) or [UNKNOWN]) == [answer]


def test_gold_position_is_uniform_and_unknown_not_told_by_the_number_of_passages():
    place, n_unknown, n_all = Counter(), Counter(), Counter()
    for i in range(4000):
        facts = BY_NAME["document_distractors"].sample(Rng("place", i), "train")
        if len(facts["passages"]) == 6:
            ((question, answer),) = facts["qa"]
            gold = [k for k, p in enumerate(facts["passages"]) if solve(p, question) == [answer]]
            place[gold[0]] += 1
        facts = BY_NAME["document_unknown"].sample(Rng("unknown", i), "train")
        k = len(facts["passages"])
        n_all[k] += len(facts["qa"])
        n_unknown[k] += sum(a == UNKNOWN for _, a in facts["qa"])
    assert max(place.values()) < 1.35 * min(place.values())
    rates = [n_unknown[k] / n_all[k] for k in n_all if n_all[k] > 300]
    assert 0.4 < min(rates) and max(rates) < 0.65 and max(rates) - min(rates) < 0.12


def test_counterfactuals_contradict_what_is_known():
    known = known_facts()
    for split in ("train", "eval"):
        for i in range(200):
            facts = BY_NAME["document_counterfactual"].sample(Rng(i), split)
            stated = [f for p in facts["passages"] for f in p if (f[0], f[1]) in known]
            assert stated and all(known[f[0], f[1]] != f[2] for f in stated)
            assert {f[0] for f in stated} <= set(COUNTERFACTUAL_PEOPLE[split])


def test_fifteen_per_cent_have_an_alias():
    n = with_alias = 0
    for i in range(2000):
        passages = BY_NAME["document_qa"].sample(Rng(i), "train")["passages"]
        facts = [f for p in passages for f in p]
        n += len({f[0] for f in facts})
        with_alias += len({f[0] for f in facts if f[1] == "alias"})
    assert 0.10 < with_alias / n < 0.20


def test_long_documents_have_ten_to_thirty_sentences():
    lengths = [BY_NAME["biography"].document(Rng(i)).count(".") for i in range(300)]
    assert 9 <= min(lengths) and max(lengths) <= 36 and 14 < sum(lengths) / 300 < 26


@pytest.mark.parametrize("split", ["train", "eval"])
def test_question_kinds_read_back(split):
    a, b = people(split)[:2]
    kinds = [
        ["path", a, "works_for", "based_in", "~mayor_of"], ["path", "Ripon", "~lives_in"], ["when", a,
        "married", b],
        ["both", "lives_in", "Ripon", "works_as", "actor"], ["same", "has_pet", a, b], ["first", "became", a,
        b],
        ["count", "works_as", "actor"], ["list", a, "plays"], ["everyone", "born_in", "Ripon"], ["now",
        "home", a],
        ["before", "company", a], ["asof", "job", a, "March 1987"], ["times", "home", a],
    ]  # fmt: skip
    for question in kinds:
        for i in range(20):
            assert read_question(write_question(question, Rng(i), split)) == (question, split)


def test_alias_and_pronoun_resolve():
    facts = [
        ["Balbert", "alias", "the baker of Ripon"],
        ["Balbert", "lives_in", "Dover"],
        ["Balbert", "owns", "axe"],
    ]
    texts = {write_passage(facts, Rng(i)) for i in range(60)}
    assert any(" He " in t for t in texts) and any("he baker of Ripon" in t.split(".", 1)[1] for t in texts)
    assert all(read_passage(t) == (facts, "train") for t in texts)
    with pytest.raises(ValueError, match="pronoun"):
        read_passage("He lives in Ripon.")


def test_near_duplicates_lie_in_the_range():
    for i in range(150):
        text = BY_NAME["biography"].document(Rng(i))
        copy = near_duplicate(text, Rng("copy", i))
        assert 0.6 <= jaccard(text, copy) <= 0.9 and copy != text
    with pytest.raises(ValueError, match="text"):
        near_duplicate("a", Rng(1))
