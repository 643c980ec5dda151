"""Stories read like stories: variety, cause and effect, dialogue and coherence, measured on fresh text.

CI measures 1 MB; WORLD_MEGABYTES=10 in the environment measures the 10 MB for which the bars were set.
"""

from __future__ import annotations

import lzma
import os
from collections import Counter

import pytest

from refimpl.world.formats import BY_NAME
from refimpl.world.rng import Rng
from refimpl.world.stories import coherent, concepts, skeleton, units, valid
from refimpl.world.story_events import RULES, replay

MEGABYTES = float(os.environ.get("WORLD_MEGABYTES", "1"))
STORY = BY_NAME["story"]


@pytest.fixture(scope="module")
def fresh() -> list[tuple[dict, str]]:
    """(facts, text) of stories, MEGABYTES of text."""
    rng, found, n = Rng("quality"), [], 0
    while n < MEGABYTES * 1e6:
        facts = STORY.sample(rng, "train")
        text = STORY.render(facts, rng)
        found.append((facts, text))
        n += len(text)
    return found


def test_no_sentence_skeleton_wears_out(fresh):
    """Names and nouns masked, no sentence is more than 0.3 per cent of all sentences."""
    counts: Counter = Counter()
    for _, text in fresh:
        counts.update(skeleton(unit)[0] for unit in units(text.rstrip("\n")))
    (worst, n), *_ = counts.most_common(1)
    share = n / counts.total()
    print(f"{len(counts)} skeletons in {counts.total()} sentences; the commonest {share:.4%}: {worst}")
    assert share <= 0.003


def test_xz_finds_little_to_save(fresh):
    blob = "".join(text for _, text in fresh).encode()
    ratio = len(lzma.compress(blob, preset=9)) / len(blob)
    print(f"xz -9: {ratio:.3f} of {len(blob)} bytes")
    assert ratio >= 0.10


def test_one_thing_leads_to_another_and_people_speak(fresh):
    """At least three cause-effect links, and at least one line of dialogue, in 80 per cent of the stories."""
    links = [replay([event.split(":")[0] for event, _ in facts["events"]])[2] for facts, _ in fresh]
    linked = sum(n >= 3 for n in links) / len(fresh)
    spoken = sum('"' in text for _, text in fresh) / len(fresh)
    both = sum(n >= 3 and '"' in text for n, (_, text) in zip(links, fresh, strict=True)) / len(fresh)
    print(f"three links {linked:.3f}, a line of dialogue {spoken:.3f}, both {both:.3f}")
    assert both >= 0.80


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_story_is_coherent(split):
    rng = Rng("quality coherent", split)
    for _ in range(300):
        text = STORY.document(rng, split)
        assert coherent(text) == (True, ""), text
        assert valid(text) == 1.0


def test_all_event_types_and_concepts_occur(fresh):
    used = {event.split(":")[0] for facts, _ in fresh for event, _ in facts["events"]}
    assert used == set(RULES) and len(used) >= 60
    shown = Counter(c for facts, _ in fresh for c, there in concepts(facts).items() if there)
    assert len(shown) >= 20 and min(shown.values()) / len(fresh) > 0.02


def test_no_story_is_told_twice(fresh):
    assert len({text for _, text in fresh}) == len(fresh)
