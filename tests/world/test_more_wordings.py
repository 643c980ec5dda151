"""The third table of wordings: read back exactly, far from every held-out template, and new to the models."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from refimpl.world import documents
from refimpl.world.document_formats import FORMATS
from refimpl.world.documents import people, read_passage, read_question, write_passage, write_question
from refimpl.world.formats import BY_NAME
from refimpl.world.lexicon import TOWNS
from refimpl.world.relation_forms import PERSON_FRAMES, VALUE_FRAMES, WHO_FRAMES
from refimpl.world.relation_forms_more import (
    MORE,
    MORE_PERSON_FRAMES,
    MORE_VALUE_FRAMES,
    MORE_WHO_FRAMES,
)
from refimpl.world.relations import (
    _CLAUSES,
    _HELD,
    _WHO,
    ARTICLE,
    ASKED,
    DATES,
    RELATIONS,
    expand,
    read_path,
    read_statement,
    read_when,
)
from refimpl.world.rng import Rng

QUESTIONS = ("asks", "paraphrases", "phrase", "inverse", "who", "when")
# Words without a content of their own, in the comparison of bags of words.
FUNCTION_WORDS = frozenset(
    """a an and are as at be been by can could did do does for from had has have here how i in is it its may
    me no not of on one or she should so that the their them there these this those to upon was were what when
    where which who whom whose will with would you your he""".split()
)


@cache
def words(template: str) -> tuple[str, ...]:
    """Lower-case words; a slot is a word."""
    return tuple(re.findall(r"\{.\}|[a-z']+", template.lower().replace("{s}'s", "{s} 's")))


def content(template: str) -> Counter:
    """The bag of content words; {a} is {v} with its article."""
    return Counter(w.replace("{a}", "{v}") for w in words(template) if w not in FUNCTION_WORDS)


def distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def templates() -> dict[str, tuple[list[str], list[str]]]:
    """{group: (held-out templates, those of the third table)}: relations, and what is framed around them."""
    special = [(by["eval"], by["more"]) for by in documents._SPECIAL.values()]
    tables = (documents._ALIAS, documents._APPOSITION, documents._OPENINGS)
    groups = {
        r.name: (
            [t for f, k in _HELD.items() for t in getattr(r, f)[-k:]],
            [t for ts in MORE[r.name].values() for t in ts],
        )
        for r in RELATIONS.values()
    }
    groups["noun frames"] = [VALUE_FRAMES[-1], PERSON_FRAMES[-1]], [*MORE_VALUE_FRAMES, *MORE_PERSON_FRAMES]
    for kind, frames in WHO_FRAMES.items():
        groups[f"{kind} frames"] = [frames[-1]], list(MORE_WHO_FRAMES[kind])
    groups["special"] = [t for held, _ in special for t in held], [t for _, ts in special for t in ts]
    groups["names"] = [t for by in tables for t in by["eval"]], [t for by in tables for t in by["more"]]
    return {name: (held, [one for t in ts for one in expand(t)]) for name, (held, ts) in groups.items()}


def held_out() -> list[str]:
    """Every held-out template."""
    return [t for held, _ in templates().values() for t in held]


def more() -> list[str]:
    """Every template of the third table, its alternatives one by one."""
    return [t for _, ts in templates().values() for t in ts]


def test_every_relation_has_many_more():
    assert set(MORE) == set(RELATIONS)
    for name in ASKED:
        relation, fields = RELATIONS[name], MORE[name]
        assert len(fields["states"]) >= 12
        assert sum(len(fields.get(f, ())) for f in QUESTIONS) >= 12
        assert {f for f in QUESTIONS if getattr(relation, f)} == {f for f in QUESTIONS if f in fields}
        first = [t.startswith("{s} ") for t in fields["states"]]
        assert sum(first) >= 4 and not all(first)
    for fields in MORE.values():
        for field, templates in fields.items():
            plain = [one for t in templates for one in expand(t)]
            assert len(set(plain)) == len(plain), field


def test_no_template_is_nearly_a_held_out_one():
    """Three or more words away from those that say the same; of no other the same content words or a part."""
    near = [
        (held, template) for held_of, more_of in templates().values() for held in held_of
        for template in more_of if distance(words(held), words(template)) < 3
    ]  # fmt: skip
    for held in held_out():
        bag = content(held)
        # Slots and function words alone are no content: there the distance decides.
        telling = any(w[0] not in "{'" for w in bag)
        near += [(held, t) for t in more() if held in t or (telling and content(t) == bag)]
    assert not near, near


def test_a_near_copy_would_be_found():
    assert distance(words("{s} loves {v}."), words("{s} adores {v}.")) == 1
    assert content("Of which town is {s} the mayor?") == content("In what town is {s} the mayor?")
    assert content("{s} is {a}.") == Counter({"{s}": 1, "{v}": 1})
    assert len(held_out()) > 150 and len(more()) > 1500


def test_no_template_was_trained_before():
    old = {t for r in RELATIONS.values() for f in _HELD for t in getattr(r, f)}
    old |= {*VALUE_FRAMES, *PERSON_FRAMES, *(f for fs in WHO_FRAMES.values() for f in fs)}
    old |= {t for by in documents._SPECIAL.values() for t in (*by["train"], *by["eval"])}
    for table in (documents._ALIAS, documents._APPOSITION, documents._OPENINGS):
        old |= {*table["train"], *table["eval"]}
    assert not old & set(more())


@pytest.mark.parametrize("name", RELATIONS)
def test_every_template_reads_back(name):
    relation, rng = RELATIONS[name], Rng("more templates", name)

    def filled(template):
        s = "Abbot" if relation.subject == "school" else "Acorn" if relation.subject == "company" else ""
        s = s or rng.choice((rng.choice(people("train")), f"the baker of {rng.choice(TOWNS)}"))
        v = rng.choice(relation.values or people("train"))
        d = rng.choice(DATES) if relation.kind == "dated" else ""
        text = template.format(s=s, v=v, a=ARTICLE.get(v, v), d=d)
        return text[0].upper() + text[1:], s, v, d

    for template in (t for raw in MORE[name]["states"] for t in expand(raw)):
        text, s, v, d = filled(template)
        assert text.endswith(".") and text.count(".") == 1
        assert read_statement(text) == ((s, name, v) + ((d,) if d else ()), "more"), text
    for field in ("asks", "paraphrases", "who", "when"):
        for template in (t for raw in MORE[name].get(field, ()) for t in expand(raw)):
            text, s, v, _ = filled(template)
            assert text.endswith("?")
            if field == "when":
                assert read_when(text) == ((s, name, v), "more"), text
            else:
                path = (v, "~" + name) if field == "who" else (s, name)
                assert read_path(text) == (path, "more"), text
    for field, inner in (("phrase", "s"), ("inverse", "v")):
        for template in (t for raw in MORE[name].get(field, ()) for t in expand(raw)):
            text, s, v, _ = filled(template)
            path = (s, name) if inner == "s" else (v, "~" + name)
            phrase = text[0].lower() + text[1:]
            assert read_path(f"Do you know {phrase}?") == (path, "more"), text
    if name in _WHO:
        for form in (*_WHO[name]["more"][:: max(1, len(_WHO[name]["more"]) // 60)],):
            v = rng.choice(relation.values)
            assert read_path(form("", v, ARTICLE.get(v, v), "")) == ((v, "~" + name), "more")
        assert len(_CLAUSES[name]["more"]) >= 4


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_formats_round_trip_with_training_names_in_other_words(fmt):
    strangers = set(people("eval"))
    for i in range(60):
        facts = fmt.sample(Rng(fmt.name, "more", i), "train") | {"split": "more"}
        text = fmt.render(facts, Rng("surface", i))
        assert fmt.parse(text) == facts
        assert text != fmt.render(facts | {"split": "train"}, Rng("surface", i))
        assert not strangers & set(re.findall(r"[A-Z][a-z]+", text))


def test_passages_and_questions_name_their_wording():
    facts = [["Balbert", "alias", "Bal"], ["Balbert", "lives_in", "Ripon"], ["Balbert", "plays", "cello"]]
    texts = {write_passage(facts, Rng(i), "more", prose=True) for i in range(200)}
    assert len(texts) > 150 and any(" He " in t for t in texts)
    assert all(read_passage(t) == (facts, "more") for t in texts)
    with pytest.raises(ValueError, match="mixes"):
        read_passage("Balbert lives in Ripon. Balbert has mastered the cello.")
    a, b = people("train")[:2]
    kinds = [
        ["path", a, "works_for", "based_in", "~mayor_of"], ["path", "Ripon", "~lives_in"],
        ["when", a, "married", b], ["both", "lives_in", "Ripon", "works_as", "actor"],
        ["same", "has_pet", a, b], ["first", "became", a, b], ["count", "works_as", "actor"],
        ["list", a, "plays"], ["everyone", "born_in", "Ripon"], ["now", "home", a],
        ["before", "company", a], ["asof", "job", a, "March 1987"], ["times", "home", a],
    ]  # fmt: skip
    for question in kinds:
        for i in range(20):
            assert read_question(write_question(question, Rng(i), "more"), {}) == (question, "more")


def test_no_document_of_the_world_is_written_with_it():
    """The exact text of split "train" is pinned elsewhere; here, that neither split draws from the table."""
    form = BY_NAME["document_qa"]
    for split in ("train", "eval"):
        for i in range(150):
            assert form.parse(form.document(Rng("other", i), split))["split"] == split
