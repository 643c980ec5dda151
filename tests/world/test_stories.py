"""Stories: facts come back, extractors agree, nothing contradicts itself, lengths tell no attribute."""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter

import pytest

from refimpl.world import stories as S
from refimpl.world.rng import Rng
from refimpl.world.stories import (
    ATTRIBUTES,
    attributes,
    coherent,
    concepts,
    cut_opening,
    parse_story,
    render_story,
    sample_story,
    valid,
)
from refimpl.world.story_events import CONCEPTS, RULES, replay
from refimpl.world.story_formats import FORMATS, distance_bin
from refimpl.world.story_forms import STYLE, TOPIC_NOUNS

N = 3000
BY_NAME = {f.name: f for f in FORMATS}


@pytest.fixture(scope="module")
def sample() -> list[tuple[dict, str]]:
    found = []
    for i in range(N):
        rng = Rng("test stories", i)
        facts = sample_story(rng)
        found.append((facts, render_story(facts, rng)))
    return found


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_parse_inverts_render(fmt, split):
    for i in range(400):
        facts = fmt.sample(Rng(fmt.name, i), split)
        text = fmt.render(facts, Rng("how", i))
        assert text.endswith("\n") and "<|" not in text
        assert fmt.parse(text) == facts == json.loads(json.dumps(facts)), text
        if fmt.boundary:
            prompt, completion = fmt.prompt(text)
            assert completion.startswith(" ") and not prompt.endswith(" ")


def test_other_words_same_facts():
    facts = sample_story(Rng("one"))
    texts = {render_story(facts, Rng("w", i)) for i in range(200)}
    assert len(texts) > 150
    assert all(parse_story(t) == facts for t in texts)


def test_every_sentence_of_the_grammar_reads_back():
    env = S._env(
        dict(
            P="Nora",
            C="Ned",
            k="owl",
            g="mill",
            f="cousin",
            T="songs",
            x="oyster",
            l="dock",
            h="diver",
            m="raft",
        )
    )
    for event, variants in S._SENTENCES.items():
        for variant, by_style in enumerate(variants):
            for sentence in (*by_style[0], *by_style[1]):
                text = sentence % env
                assert S.units(text) == [text]
                read = S.read_unit(text)
                assert read is not None and read[:2] == (event, variant), text


def test_event_types_and_forms():
    forms = Counter()
    for event, variants in S._SENTENCES.items():
        forms[event.split(":")[0]] += len({s for pair in variants for style in pair for s in style})
    assert len(forms) >= 60 and min(forms.values()) >= 8
    assert set(forms) == set(RULES)


def test_extractors_agree_with_metadata(sample):
    assert sum(attributes(text) == facts["attributes"] for facts, text in sample) / N >= 0.98


def test_attributes_do_not_show_in_the_length_or_in_each_other(sample):
    def corr(a, b):
        ma, mb = sum(a) / N, sum(b) / N
        num = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=False))
        return num / (sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b)) ** 0.5

    length = [len(re.findall(r" ?[A-Za-z]+| ?[^\sA-Za-z]+", text)) for _, text in sample]
    columns = {
        (name, value): [facts["attributes"][name] == value for facts, _ in sample]
        for name, values in ATTRIBUTES.items()
        for value in values
    }
    for key, column in columns.items():
        assert abs(corr(column, length)) < 0.1, key
        for other, column2 in columns.items():
            if other[0] != key[0]:
                assert abs(corr(column, column2)) < 0.08, (key, other)


def test_opening_tells_no_attribute():
    """The first sentence is the same for all values: it depends on people, place and time only."""
    for i in range(50):
        texts = set()
        for ending in ATTRIBUTES["ending"]:
            for style in ATTRIBUTES["style"]:
                facts = sample_story(Rng("o", i), attributes={"ending": ending, "style": style})
                texts.add((facts["cast"]["P"], facts["cast"]["g"], facts["cast"]["k"]))
        assert len(texts) == 1
    for event in ("open_day", "open_night"):
        assert all(simple == rich for simple, rich in S._SENTENCES[event])


def test_coherent_valid_and_short(sample):
    lengths = sorted(len(text.split()) for _, text in sample)
    assert 45 <= sum(lengths) / N <= 70 and lengths[int(0.97 * N)] <= 76
    for facts, text in sample[:500]:
        assert valid(text) == 1.0 and coherent(text) == (True, "")
        assert replay([e.split(":")[0] for e, _ in facts["events"]])[2] >= 3
        assert parse_story(text) == facts
        prompt, completion = cut_opening("Reader: likes rain.\n" + text + "\n")
        assert prompt.endswith(".") and completion.startswith(" ")
    assert sum('"' in text for _, text in sample) / N >= 0.8


def test_broken_stories_are_found(sample):
    facts, text = sample[0]
    pieces = S.units(text)
    assert not coherent(" ".join(pieces[1:]))[0]  # nobody introduced
    assert not coherent(" ".join(pieces[:-1]))[0]  # no end
    assert not coherent(" ".join(pieces + pieces[-1:]))[0]  # two ends
    assert not coherent(" ".join([pieces[0], *pieces[2:]]))[0]  # companion missing
    assert not coherent(text.replace(facts["cast"]["C"], "Zzyzx", 1))[0]
    name = facts["cast"]["P"]
    last = text.rfind(name)
    if last != text.find(name):
        other = "Walter" if name != "Walter" else "Adam"
        assert not coherent(text[:last] + other + text[last + len(name) :])[0]
    assert valid("The a a a a a Sam") == 0.0 and valid("") == 0.0
    assert 0 < valid(pieces[0] + " Colourless green ideas sleep.") < 1


def test_an_unintroduced_helper_is_found():
    text = (
        "Once a boy named Leo lived near the mill. Nobody loved jokes more than his kind friend Kate. "
        "On the way to the barn, their small lamb got lost. Then heavy snow made them cold. "
        "So they went back and found marks near the barn. They found the lamb under a bench. "
        "They laughed until their sides hurt."
    )
    assert coherent(text) == (True, "")
    stolen = text.replace("They found the lamb under a bench.", "The vet nodded and gave them the lamb back.")
    assert not coherent(stolen)[0]
    trapped = text.replace("On the way to the barn, their small lamb got lost.", "{}").format(
        "Their lamb got loose and was stuck high up at the barn."
    )
    helped = trapped.replace(
        "So they went back and found marks near the barn.", "The vet brought them a nice rope."
    )
    helped = helped.replace(
        "They found the lamb under a bench.", "They pulled together, and out popped the lamb."
    )
    assert coherent(helped) == (False, "text: something is spoken of as known that was never introduced")


def test_no_sentence_wears_out(sample):
    counts, total = Counter(), 0
    for _, text in sample:
        for unit in S.units(text):
            counts[S.skeleton(unit)[0]] += 1
            total += 1
    assert counts.most_common(1)[0][1] / total < 0.004  # 0.003 over 10 MB; this sample is small
    blob = "\n".join(text for _, text in sample).encode()
    assert len(lzma.compress(blob, preset=9)) / len(blob) > 0.10


def test_word_lists_are_disjoint():
    seen = Counter(noun for by_topic in TOPIC_NOUNS.values() for nouns in by_topic.values() for noun in nouns)
    assert max(seen.values()) == 1
    simple = {w for pair in STYLE.values() for w in pair[0]}
    rich = {w for pair in STYLE.values() for w in pair[1]}
    assert not simple & rich


def test_concepts_vary(sample):
    share = Counter(c for facts, _ in sample for c, there in concepts(facts).items() if there)
    assert len(CONCEPTS) >= 20
    assert all(0.02 < share[c] / N < 0.9 for c in CONCEPTS), share


def test_splits_are_disjoint():
    pairs = {
        split: {
            (s["cast"]["P"], s["cast"]["g"])
            for s in (sample_story(Rng(split, i), split) for i in range(2000))
        }
        for split in ("train", "eval")
    }
    assert not pairs["train"] & pairs["eval"]


def test_answers_are_balanced():
    for name in ("judge", "sort"):
        answers = Counter(BY_NAME[name].sample(Rng(name, i), "train")["answers"][0] for i in range(2000))
        assert abs(answers["A"] - 1000) < 120
    bins = Counter()
    for i in range(2000):
        facts = BY_NAME["sort"].sample(Rng("bins", i), "eval")
        bins[distance_bin(*facts["pairs"][0], len(facts["events"]))] += 1
    assert min(bins.values()) > 400
    scores = Counter()
    for i in range(500):
        text = BY_NAME["feedback"].document(Rng("f", i))
        scores.update(re.findall(r"Score: (\d)", text))
    assert set(scores) == set("12345")


def test_every_format_serves_a_spec():
    assert all(f.serves for f in FORMATS)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_foreign_text_is_refused(fmt):
    for text in ("Hello.\n", "", "A: b\nB: c\n", fmt.document(Rng("x"))[:-2]):
        with pytest.raises(ValueError):
            fmt.parse(text)


def test_bad_input():
    with pytest.raises(ValueError, match="split"):
        sample_story(Rng("x"), "test")
    with pytest.raises(ValueError, match="attributes"):
        sample_story(Rng("x"), attributes={"ending": "blue"})
    with pytest.raises(ValueError, match="attributes"):
        sample_story(Rng("x"), attributes={"colour": "blue"})
    with pytest.raises(ValueError, match="name"):
        S.change_story(sample_story(Rng("x")), "topic", Rng("y"))
    with pytest.raises(ValueError, match="text"):
        cut_opening("Nothing here")
