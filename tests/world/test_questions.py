"""The RAG question sets: sizes, unique answers, gold spans, and how hard they are for BM25."""

import heapq
import json
import re
from collections import Counter
from itertools import pairwise
from math import log

import pytest

from refimpl.world.documents import UNKNOWN, people, read_passage, read_question, solve
from refimpl.world.questions import _TYPES, content_words, questions, world
from refimpl.world.relations import known_facts


@pytest.fixture(scope="module")
def w():
    return world(0, 2000)


@pytest.fixture(scope="module")
def sets(w):
    return {kind: questions(w, kind, 300) for kind in _TYPES}


def _words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


class BM25:
    def __init__(self, texts, k1=1.5, b=0.75):
        bags = [Counter(_words(t)) for t in texts]
        lengths = [sum(bag.values()) for bag in bags]
        mean = sum(lengths) / len(lengths)
        self.postings = {}
        for i, bag in enumerate(bags):
            for word, tf in bag.items():
                weight = tf / (tf + k1 * (1 - b + b * lengths[i] / mean))
                self.postings.setdefault(word, []).append((i, weight))
        self.n = len(texts)

    def top(self, query, k):
        scores = {}
        for word in _words(query):
            found = self.postings.get(word, [])
            idf = log(1 + (self.n - len(found) + 0.5) / (len(found) + 0.5))
            for i, weight in found:
                scores[i] = scores.get(i, 0.0) + idf * weight
        return heapq.nsmallest(k, scores, key=lambda i: (-scores[i], i))


@pytest.fixture(scope="module")
def bm25(w):
    out = {}
    for name in ("main", "long", "redundant"):
        docs = w.corpus(name)
        index = BM25([d.text for d in docs])
        out[name] = lambda text, k, index=index, docs=docs: [docs[i].id for i in index.top(text, k)]
    return out


def _gold_ids(question):
    return [{place[0] for place in hop} for hop in question.gold]


@pytest.mark.parametrize("kind", _TYPES)
def test_three_hundred_of_each_type(sets, kind):
    assert len(sets[kind]) == 300 and len({q.id for q in sets[kind]}) == 300


@pytest.mark.parametrize("kind", _TYPES)
def test_answers_are_unique_by_brute_force(w, sets, kind):
    known = [[p, r, v] for (p, r), v in known_facts().items()]
    for q in sets[kind]:
        facts = {"K": known, "C": q.chain, "F": w.facts[q.corpus]}[q.tier]
        if q.without:
            gone = {json.dumps(f) for d in q.without for here in w.documents[d].facts for f in here}
            facts = [f for f in facts if json.dumps(f) not in gone]
        assert (solve(facts, q.form) or [UNKNOWN]) == [q.answer], q


@pytest.mark.parametrize("kind", _TYPES)
def test_records_are_complete(w, sets, kind):
    for q in sets[kind]:
        assert q.type == kind and q.answer in q.candidates and q.answer in q.accepted and q.tier in "KFC"
        form, split = read_question(q.text, w.aliases)
        assert form == q.form and q.held_out == (split == "eval")
        assert bool(q.gold) == (q.tier != "K" and not q.without) and len(q.gold) in (0, len(q.chain))
        for hop, fact in zip(q.gold, q.chain, strict=bool(q.gold)):
            assert hop
            for doc, sentence, start, end in hop:
                d = w.documents[doc]
                assert d.sentences[sentence] == [start, end] and fact in d.facts[sentence]
                assert (
                    d.text[start:end].endswith(".") and fact[2] in d.text[start:end] and d.corpus == q.corpus
                )
        assert not {d for hop in _gold_ids(q) for d in hop} & {d for d, _ in q.distractors}
        assert json.loads(q.to_json())["id"] == q.id
    assert {"K", "C"} == {q.tier for q in sets["T0"]}


def test_rules_recover_every_fact_of_every_document(w):
    for d in w.documents:
        facts, _ = read_passage(d.text, dict(w.aliases))
        assert facts == [f for here in d.facts for f in here]
        for (_, end), (after, _) in pairwise(d.sentences):
            assert after == end + 1
        assert d.sentences[0][0] == 0 and d.sentences[-1][1] == len(d.text)


def test_no_training_name_occurs(w, sets):
    train = set(people("train"))
    for d in w.documents:
        assert not train & set(re.findall(r"[A-Z][a-z]+", d.text)), d
    for qs in sets.values():
        for q in qs:
            assert not train & set(re.findall(r"[A-Z][a-z]+", q.text))


def test_bm25_bands(sets, bm25):
    def recall(qs, k):
        hits = [[bool(hop & set(bm25[q.corpus](q.text, k))) for hop in _gold_ids(q)] for q in qs]
        return sum(sum(h) / len(h) for h in hits) / len(hits), sum(all(h) for h in hits) / len(hits)

    t1 = [q for q in sets["T1"] if q.corpus == "main"]
    measured = {
        "T1 R@1": recall(t1, 1)[0], "T1 R@5": recall(t1, 5)[0],
        "T2 AllGold@5": recall(sets["T2"], 5)[1], "T2 R@5": recall(sets["T2"], 5)[0],
        "T3 R@2": recall(sets["T3"], 2)[0],
        "T3 both R@2": recall([q for q in sets["T3"] if q.form[0] == "both"], 2)[0],
    }  # fmt: skip
    print(measured)
    assert 0.2 < measured["T1 R@1"] <= 0.9
    assert measured["T2 AllGold@5"] < 0.1
    assert measured["T3 R@2"] < 0.3 and measured["T3 both R@2"] < 0.3


def test_construction_of_chains_intersections_and_changes(w, sets):
    for q in sets["T2"]:
        assert 2 <= len(q.chain) <= 4
        bridges = {x for f in q.chain for x in (f[0], f[2])} - {q.form[1], q.answer}
        assert not any(b in q.text for b in bridges)
        for hop in q.gold:
            for doc, _, a, z in hop:
                shared = content_words(q.text) & content_words(w.documents[doc].text[a:z])
                assert shared <= content_words(q.form[1])
    for q in sets["T3"]:
        if q.form[0] == "both":
            for r, v in (q.form[1:3], q.form[3:5]):
                assert 5 <= sum(f[1] == r and f[2] == v for f in w.facts["main"]) <= 15
    kinds = Counter(q.form[0] for q in sets["T4"])
    assert set(kinds) == {"now", "before", "asof", "times"} and min(kinds.values()) >= 30
    assert {q.answer == UNKNOWN for q in sets["T6"]} == {True, False}
    for q in sets["T7"]:
        for hop in q.gold:
            texts = [w.documents[d].text for d, *_ in hop]
            assert 3 <= len(texts) <= 6 and len(set(texts)) == len(texts)


def test_sessions_repeat_facts_and_the_control_does_not(w, sets):
    by_id = {q.id: q for q in sets["T9"]}
    repeats = {}
    for name, sessions in w.sessions.items():
        again = total = 0
        for session in sessions:
            seen = set()
            for qid in session:
                if qid in by_id:
                    facts = {json.dumps(f) for f in by_id[qid].chain}
                    again += len(facts & seen)
                    total += len(facts)
                    seen |= facts
        repeats[name] = again / total
    assert repeats["related"] > 0.3 and repeats["shuffled"] < 0.1
    related, shuffled = (sorted(q for s in w.sessions[k] for q in s) for k in ("related", "shuffled"))
    assert related == shuffled


def test_same_seed_same_world(w):
    again = world(0, 2000)
    assert [d.text for d in again.documents] == [d.text for d in w.documents]
    assert questions(again, "T2", 5) == questions(w, "T2", 5)


@pytest.mark.parametrize("size", [99, 2001])
def test_bad_size(size):
    with pytest.raises(ValueError, match="size"):
        world(0, size)


def test_bad_kind(w):
    with pytest.raises(ValueError, match="kind"):
        questions(w, "T5")
    with pytest.raises(ValueError, match="n: 0"):
        questions(w, "T1", 0)
