"""Little stories with known facts: sampled, written in many ways, and read back exactly.

A story is {"attributes", "cast", "events"}: six independent attributes, who and what takes part, and the
event list, each event as [type, variant]. The variant is *what* happens ("it fell into a ditch"); the random
source of `render_story` chooses only *how* it is told. `:say` after a type marks a line of dialogue.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

from refimpl.world.base import Facts, Split
from refimpl.world.lexicon import FIRST_NAMES
from refimpl.world.rng import Rng
from refimpl.world.story_events import (
    CONCEPTS,
    EVENT_CONCEPTS,
    HAPPY_ENDS,
    MOODS,
    PLOTS,
    SAD_ENDS,
    WEATHERS,
    replay,
)
from refimpl.world.story_forms import (
    FORMS,
    GIRLS,
    HAPPY_WORDS,
    OTHER_LOVES,
    PLACES,
    RELATIONS,
    SAD_WORDS,
    SPECIES,
    STYLE,
    TOPIC_NOUNS,
    TOPIC_TITLES,
    TOPICS,
)

ATTRIBUTES: dict[str, tuple] = {
    "style": ("simple", "rich"),
    "topic": TOPICS,
    "ending": ("happy", "sad"),
    "dialogue": ("low", "high"),
    "weather": WEATHERS,
    "mention": (False, True),
}
MAX_FORMS = 240  # expanded sentences kept per variant and style
MAX_TOKENS = 84  # words and marks of a story; a longer telling is told again

# ----------------------------------------------------------------------------- compiling the templates
_ALTERNATION = re.compile(r"\(([^()]*)\)")
_STYLE_WORD = re.compile(r"<(\w+)(!?)>")


def _thin(items: list[str], n: int) -> list[str]:
    """At most n of the items, evenly spread."""
    return items if len(items) <= n else [items[i * len(items) // n] for i in range(n)]


def _expand(template: str, style: int) -> list[str]:
    """All sentences of a template in one style, with `%(slot)s` for the slots."""
    pieces: list[list[str]] = []
    at = 0
    for match in re.finditer(r"\(([^()]*)\)|<(\w+)(!?)>", template):
        pieces.append([template[at : match.start()]])
        if match[1] is not None:
            options = match[1].split("|")
        else:
            options = list(STYLE[match[2]][style])
            if match[3]:
                options = [w[0].upper() + w[1:] for w in options]
        pieces.append(options)
        at = match.end()
    pieces.append([template[at:]])
    total = 1
    for options in pieces:
        total *= len(options)
    found = []
    for k in range(min(total, 4 * MAX_FORMS)):  # a fixed walk through the product, coprime to every radix
        number, parts = (k * 7919) % total if total > 4 * MAX_FORMS else k, []
        for options in pieces:
            number, digit = divmod(number, len(options))
            parts.append(options[digit])
        found.append("".join(parts))
    done = []
    for text in dict.fromkeys(found):
        for inner in _expand(text, style) if _STYLE_WORD.search(text) else [text]:
            inner = re.sub(r"\s+", " ", inner).strip()
            inner = re.sub(r"\b([Aa]) \{([xmlh])\}", lambda m: f"{{{m[1]}{m[2]}}}", inner)
            inner = inner.replace("{ak!}", "{Ak}")
            done.append(re.sub(r"\{(\w+)\}", r"%(\1)s", inner))
    done = list(dict.fromkeys(done))
    if len(done) > 12:  # stories are short: of many tellings the shorter half (and ties)
        lengths = sorted(text.count(" ") for text in done)
        done = [text for text in done if text.count(" ") <= lengths[len(lengths) // 2]]
    return _thin(done, MAX_FORMS)


_NOUN_CLASS = {
    noun: slot for slot, by_topic in TOPIC_NOUNS.items() for nouns in by_topic.values() for noun in nouns
}
_NOUN_TOPIC = {
    noun: topic for by_topic in TOPIC_NOUNS.values() for topic, nouns in by_topic.items() for noun in nouns
}
_KINDS = ("boy", "girl", *SPECIES)
_CLASS: dict[str, str] = {
    **dict.fromkeys(FIRST_NAMES, "P"),
    **_NOUN_CLASS,
    **dict.fromkeys(_KINDS, "k"),
    **dict.fromkeys(PLACES, "g"),
    **dict.fromkeys(RELATIONS["m"] + RELATIONS["f"], "f"),
    **dict.fromkeys((*TOPIC_TITLES.values(), *OTHER_LOVES), "T"),
}
_FOLD = {  # one skeleton for both genders, and for "a" and "an"
    "she": "he", "She": "He", "him": "his", "her": "his", "Her": "His", "an": "a", "An": "A",
}  # fmt: skip
_WORD = re.compile(r"the sea\b|[A-Za-z-]+|'s|[^\sA-Za-z]")
# A unit is the text of one event: it starts with a quotation and ends at the mark after it, or ends with one.
_UNIT = re.compile(r'\s*"[^"]*"[^".!?]*[.!?]|[^".!?]*(?:[.!?]|"[^"]*[.!?]")')


def skeleton(sentence: str) -> tuple[str, list[str]]:
    """The sentence with names and nouns masked, and the masked words in order.

    Examples
    --------
    >>> skeleton("Nora gave Ned an oyster.")
    ('[P] gave [P] a [x] .', ['Nora', 'Ned', 'oyster'])
    """
    masked, words = [], []
    for word in _WORD.findall(sentence):
        kind = _CLASS.get(word)
        if kind is None:
            masked.append(_FOLD.get(word, word))
        else:
            masked.append(f"[{kind}]")
            words.append(word)
    return " ".join(masked), words


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _person(name: str, companion: bool) -> dict[str, str]:
    he, him, his = ("she", "her", "her") if name in GIRLS else ("he", "him", "his")
    if companion:
        return {"C": name, "che": he, "chim": him, "chis": his}
    return {"P": name, "he": he, "him": him, "his": his, "He": he.title(), "His": his.title()}


_P_ENV = {name: _person(name, False) for name in FIRST_NAMES}
_C_ENV = {name: _person(name, True) for name in FIRST_NAMES}
_K_ENV = {kind: {"k": kind, "ak": _a(kind), "Ak": _a(kind).capitalize()} for kind in _KINDS}
_N_ENV = {
    noun: {slot: noun, "a" + slot: _a(noun), "A" + slot: _a(noun).capitalize()}
    for noun, slot in _NOUN_CLASS.items()
}


def _env(cast: Facts) -> dict[str, str]:
    """Slot -> words, for the `%` operator."""
    env = {
        **_P_ENV[cast["P"]],
        **_C_ENV[cast["C"]],
        **_K_ENV[cast["k"]],
        "g": cast["g"],
        "f": cast["f"],
        "T": cast["T"],
    }
    for slot in ("x", "l", "h", "m"):
        if slot in cast:
            env.update(_N_ENV[cast[slot]])
    return env


_TEMPLATES = {event: text.strip().replace("\n  ", " ").split("\n") for event, text in FORMS.items()}
# event -> variant -> (simple sentences, rich sentences)
_SENTENCES: dict[str, list[tuple[list[str], list[str]]]] = {
    event: [(_expand(line, 0), _expand(line, 1)) for line in lines] for event, lines in _TEMPLATES.items()
}
for _line in (line for lines in _TEMPLATES.values() for line in lines):
    assert not any(re.search(r"\{[xlhmgkfTC]\}", m) for m in _ALTERNATION.findall(_line)), _line
EVENT_TYPES = tuple(dict.fromkeys(event.split(":")[0] for event in _TEMPLATES))


# A variant that can be told in more ways comes more often, so that no sentence wears out.
_VARIANTS = {
    event: [v for v, (simple, _) in enumerate(variants) for _ in range(1 + int(4 * len(simple) ** 0.5))]
    for event, variants in _SENTENCES.items()
}


def _slots(event: str, variant: int) -> frozenset[str]:
    return frozenset(re.findall(r"\{([xlhm])\}", _TEMPLATES[event][variant]))


def _assumes(event: str, variant: int) -> frozenset[str]:
    """Things the variant speaks of as known ("the pearl")."""
    return frozenset(re.findall(r"[Tt]he \{([xhm])\}", _TEMPLATES[event][variant]))


@cache
def _courses() -> dict[tuple[str, bool, str], list[tuple[list, list, list, tuple[str, ...]]]]:
    """(plot, is the idea spoken, win or lose) -> (trouble, idea, outcome, slots) without unknowns."""
    table: dict[tuple[str, bool, str], list] = {}
    for plot, spoken, result in product(PLOTS, (False, True), ("win", "lose")):
        idea, outcome = f"{plot}.idea" + (":say" if spoken else ""), f"{plot}.{result}"
        found = []
        for a, b, c in product(*(range(len(_TEMPLATES[e])) for e in (plot, idea, outcome))):
            known = _slots(plot, a)  # what the trouble names, anybody may speak of afterwards
            if not _assumes(idea, b) <= known:
                continue
            known |= _slots(idea, b)
            if not _assumes(outcome, c) <= known:
                continue
            slots = known | _slots(outcome, c)
            found.append(([plot, a], [idea, b], [outcome, c], tuple(s for s in "xlhm" if s in slots)))
        assert found, (plot, spoken, result)
        table[plot, spoken, result] = found
    return table


# -------------------------------------------------------------------------------------------- sampling
_PLOT_NAMES = tuple(PLOTS)
# Chance of a mood sentence: it evens out the lengths of the attributes' values in tokens.
_P_MOOD = {
    ("high", "simple"): 0.14,
    ("high", "rich"): 0.06,
    ("low", "simple"): 0.32,
    ("low", "rich"): 0.24,
}


def sample_attributes(rng: Rng) -> Facts:
    """The six attributes, each uniform and independent of the others."""
    return {name: rng.choice(values) for name, values in ATTRIBUTES.items()}


def _people(rng: Rng, split: Split) -> tuple[str, str, str]:
    """Protagonist, companion, place; one in ten (protagonist, place) pairs is for evaluation."""
    while True:
        p, g = rng.below(len(FIRST_NAMES)), rng.below(len(PLACES))
        if ((7 * p + 3 * g) % 10 == 0) == (split == "eval"):
            break
    c = rng.below(len(FIRST_NAMES) - 1)
    return FIRST_NAMES[p], FIRST_NAMES[c + (c >= p)], PLACES[g]


def sample_story(rng: Rng, split: Split = "train", attributes: Facts | None = None) -> Facts:
    """Draw a story.

    Parameters
    ----------
    rng : Rng
        The source of chance.
    split : "train" or "eval"
        (protagonist, place) pairs of the two splits are disjoint.
    attributes : dict or None
        Values to keep; attributes that it lacks are drawn.

    Examples
    --------
    >>> story = sample_story(Rng("doc", 1), attributes={"ending": "sad"})
    >>> story["attributes"]["ending"], parse_story(render_story(story, Rng("doc", 2))) == story
    ('sad', True)
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: {split!r} is not one of 'train', 'eval'")
    drawn = sample_attributes(rng)
    if attributes:
        for name, value in attributes.items():
            if value not in ATTRIBUTES.get(name, ()):
                raise ValueError(
                    f"attributes: {name}={value!r}; known attributes and values are {ATTRIBUTES}"
                )
            drawn[name] = value
    protagonist, companion, place = _people(rng, split)
    girl = protagonist in GIRLS
    cast: Facts = {"P": protagonist, "C": companion, "g": place}
    cast["k"] = ("girl" if girl else "boy") if rng.chance(0.5) else rng.choice(SPECIES)
    cast["f"] = rng.choice(RELATIONS["f" if companion in GIRLS else "m"])
    cast["T"] = TOPIC_TITLES[drawn["topic"]] if drawn["mention"] else rng.choice(OTHER_LOVES)
    return {"attributes": drawn, "cast": cast, "events": _events(rng, drawn, cast)}


def _events(rng: Rng, attributes: Facts, cast: Facts) -> list[list]:
    """The event list for these attributes; fills the things and places of the plot into `cast`."""
    dialogue, happy = attributes["dialogue"], attributes["ending"] == "happy"
    mood = rng.choice(MOODS) if rng.chance(_P_MOOD[dialogue, attributes["style"]]) else None
    if dialogue == "high":
        say_mood = say_idea = say_end = True
    else:
        line = rng.below(4)  # one spoken line in three of four quiet stories
        say_mood, say_idea, say_end = (
            line == 3 and mood is not None,
            line == 0,
            line in (1, 3) and not (line == 3 and mood),
        )
    plot = _PLOT_NAMES[rng.below(len(_PLOT_NAMES))]
    courses = _courses()[plot, say_idea, "win" if happy else "lose"]
    trouble, idea, outcome, slots = courses[rng.below(len(courses))]
    for slot in slots:
        cast[slot] = rng.choice(TOPIC_NOUNS[slot][attributes["topic"]])
    end = rng.choice(HAPPY_ENDS if happy else SAD_ENDS) + (":say" if say_end else "")
    weather = _any(rng, attributes["weather"])
    middle = [trouble]
    if mood is not None:
        middle.append(_any(rng, mood + (":say" if say_mood else "")))
    middle.append(idea)
    middle.insert(rng.between(1, len(middle)), weather)
    opening = "open_night" if rng.chance(0.25) else "open_day"
    return [
        _any(rng, opening),
        _any(rng, "friend"),
        *[list(e) for e in middle],
        list(outcome),
        _any(rng, end),
    ]


def _any(rng: Rng, event: str) -> list:
    return [event, rng.choice(_VARIANTS[event])]


def change_story(story: Facts, name: str, rng: Rng) -> Facts:
    """The same people and plot with one attribute ("style", "ending" or "dialogue") turned round."""
    if name not in ("style", "ending", "dialogue"):
        raise ValueError(f"name: {name!r} is not one of 'style', 'ending', 'dialogue'")
    values = ATTRIBUTES[name]
    attributes = {**story["attributes"], name: values[1 - values.index(story["attributes"][name])]}
    cast, events = dict(story["cast"]), [list(e) for e in story["events"]]
    if name == "style":
        return {"attributes": attributes, "cast": cast, "events": events}
    plot = next(e for e, _ in events if e in PLOTS)
    trouble = next(e for e in events if e[0] == plot)
    talk = attributes["dialogue"] == "high"
    spoken = {"idea": talk, "end": talk, "mood": talk}
    if name == "ending":  # who speaks stays as it was
        for event, _ in events:
            part = "idea" if ".idea" in event else "end" if event.startswith("end_") else "mood"
            if part == "idea" or part == "end" or event.split(":")[0] in MOODS:
                spoken[part] = event.endswith(":say")
    happy = attributes["ending"] == "happy"
    courses = [c for c in _courses()[plot, spoken["idea"], "win" if happy else "lose"] if c[0] == trouble]
    _, idea, outcome, slots = rng.choice(courses)
    for slot in "xlhm":
        if slot in slots and slot not in cast:
            cast[slot] = rng.choice(TOPIC_NOUNS[slot][attributes["topic"]])
        elif slot not in slots:
            cast.pop(slot, None)
    for i, (event, _) in enumerate(events):
        base = event.split(":")[0]
        if base.endswith(".idea"):
            events[i] = list(idea)
        elif base.endswith((".win", ".lose")):
            events[i] = list(outcome)
        elif base.startswith("end_"):
            kind = base if name == "dialogue" else rng.choice(HAPPY_ENDS if happy else SAD_ENDS)
            events[i] = _any(rng, kind + (":say" if spoken["end"] else ""))
        elif base in MOODS:
            events[i] = _any(rng, base + (":say" if spoken["mood"] else ""))
    return {"attributes": attributes, "cast": cast, "events": events}


# ------------------------------------------------------------------------------------------- rendering
def render_story(story: Facts, rng: Rng) -> str:
    """Write the story as one paragraph without a final newline."""
    env = _env(story["cast"])
    style = 0 if story["attributes"]["style"] == "simple" else 1
    forms = [_SENTENCES[event][variant][style] for event, variant in story["events"]]
    random = rng.random
    for _ in range(8):
        text = " ".join([options[int(random() * len(options))] for options in forms]) % env
        if (
            text.count(" ") + text.count(".") + text.count(",") + text.count('"') // 2 + text.count("'")
            < MAX_TOKENS
        ):
            break
    return text


# --------------------------------------------------------------------------------------------- reading
@cache
def _index() -> dict[str, tuple[str, int, frozenset[int], tuple[str, ...], tuple[str, ...]]]:
    """skeleton -> (event, variant, styles, slots of the masked words ("=w": the fixed word w), tellings)."""
    names = {"P": "Adam", "C": "Alice", "k": "fox", "g": "bridge", "f": "friend", "T": "jokes"}
    names |= {slot: by_topic["sea"][0] for slot, by_topic in TOPIC_NOUNS.items()}
    env = _env(names)
    slot_of = {word: slot for slot, word in names.items()}
    found: dict[str, list] = {}
    for event, variants in _SENTENCES.items():
        for variant, by_style in enumerate(variants):
            for style, sentences in enumerate(by_style):
                for sentence in sentences:
                    key, words = skeleton(sentence % env)
                    used = iter(
                        s.lstrip("aA") if s[-1] in "xlhm" else s.lstrip("aA") for s in _masked_slots(sentence)
                    )
                    slots = []
                    pending = next(used, None)
                    for word in words:
                        if pending is not None and slot_of.get(word) == pending:
                            slots.append(pending)
                            pending = next(used, None)
                        else:
                            slots.append("=" + word)
                    assert pending is None, sentence
                    entry = found.setdefault(key, [event, variant, set(), tuple(slots), []])
                    same = [a for a in entry[3] if a[0] != "="] == [a for a in slots if a[0] != "="]
                    assert entry[:2] == [event, variant] and same, (sentence, entry)
                    entry[2].add(style)
                    entry[4].append(sentence)
    return {k: (e, v, frozenset(s), p, tuple(f)) for k, (e, v, s, p, f) in found.items()}


def _masked_slots(sentence: str) -> list[str]:
    return [s for s in re.findall(r"%\((\w+)\)s", sentence) if s not in _PRONOUNS]


_PRONOUNS = frozenset("he him his He His che chim chis".split())


def units(text: str) -> list[str]:
    """Cut a story into the texts of its events."""
    return [m[0].strip() for m in _UNIT.finditer(text)]


def read_unit(unit: str) -> tuple[str, int, dict[str, str]] | None:
    """The event, variant and slots of one unit, or None when no template tells it."""
    key, words = skeleton(unit)
    entry = _index().get(key)
    if entry is None:
        return None
    slots: dict[str, str] = {}
    for slot, word in zip(entry[3], words, strict=True):
        if slot[0] != "=" and slots.setdefault(slot, word) != word:
            return None
    return entry[0], entry[1], slots


def parse_story(text: str) -> Facts:
    """Read a story back to its facts; ValueError says what is wrong with a text that is none."""
    found = units(text)
    if " ".join(found) != text:
        raise ValueError("text: not a chain of sentences separated by single spaces")
    cast: dict[str, str] = {}
    events: list[list] = []
    styles = frozenset((0, 1))
    for unit in found:
        read = read_unit(unit)
        if read is None:
            raise ValueError(f"text: no story sentence reads {unit!r}")
        event, variant, slots = read
        for slot, word in slots.items():
            if cast.setdefault(slot, word) != word:
                raise ValueError(f"text: {slot} is {cast[slot]!r} and then {word!r}")
        styles &= _index()[skeleton(unit)[0]][2]
        events.append([event, variant])
    kinds = [event.split(":")[0] for event, _ in events]
    fine, reason, _ = replay(kinds)
    if not fine:
        raise ValueError(f"text: {reason}")
    trouble, idea, outcome = (
        [e for e in events if test(e[0])]
        for test in (PLOTS.__contains__, lambda e: ".idea" in e, lambda e: e.endswith((".win", ".lose")))
    )
    if not len(trouble) == len(idea) == len(outcome) == 1:
        raise ValueError("text: not one trouble, one idea and one outcome")
    course = [trouble[0], idea[0], outcome[0]]
    known = _courses()[trouble[0][0], idea[0][0].endswith(":say"), outcome[0][0].rpartition(".")[2]]
    if course not in [list(c[:3]) for c in known]:
        raise ValueError("text: something is spoken of as known that was never introduced")
    missing = [slot for slot in ("P", "C", "k", "g", "f", "T") if slot not in cast]
    if missing or len(styles) != 1:
        raise ValueError(f"text: no {missing} in it" if missing else "text: its style is not one style")
    env = _env(cast)
    for unit in found:
        if unit not in {sentence % env for sentence in _index()[skeleton(unit)[0]][4]}:
            raise ValueError(f"text: a pronoun or article does not fit in {unit!r}")
    topics = {_NOUN_TOPIC[cast[s]] for s in ("x", "l", "h", "m") if s in cast}
    if len(topics) != 1:
        raise ValueError(f"text: topics {sorted(topics)} in one story")
    topic = topics.pop()
    weathers = [k for k in kinds if k in WEATHERS]
    if len(weathers) != 1:
        raise ValueError(f"text: {len(weathers)} weathers in one story")
    attributes = {
        "style": ATTRIBUTES["style"][next(iter(styles))],
        "topic": topic,
        "ending": "happy" if kinds[-1] in HAPPY_ENDS else "sad",
        "dialogue": "high" if sum(e.endswith(":say") for e, _ in events) >= 2 else "low",
        "weather": weathers[0],
        "mention": cast["T"] == TOPIC_TITLES[topic],
    }
    return {"attributes": attributes, "cast": cast, "events": events}


# ---------------------------------------------------------------------- extractors for any text at all
# A style word that the fixed text of a template uses too tells nothing, so it is left out.
_FIXED_WORDS = frozenset(re.findall(r"[a-z]+", _STYLE_WORD.sub(" ", " ".join(FORMS.values())).lower()))
_SIMPLE_WORDS, _RICH_WORDS = (
    frozenset(w.lower() for both in STYLE.values() for w in both[i] if " " not in w) - _FIXED_WORDS
    for i in (0, 1)
)
_WEATHER_WORDS = {
    "rain": frozenset("rain rained raindrops poured downpour".split()),
    "snow": frozenset("snow snowed blizzard".split()),
    "wind": frozenset("wind gale".split()),
}
_TITLE_WORDS = {"animals": "animals", "sea": "sea", "food": "food", "machines": "machines"}


def attribute_lexicons() -> dict[str, dict[str, frozenset[str]]]:
    """The word lists behind `attributes`: attribute -> value -> words."""
    return {
        "style": {"simple": _SIMPLE_WORDS, "rich": _RICH_WORDS},
        "topic": {t: frozenset(n for s in TOPIC_NOUNS.values() for n in s[t]) for t in TOPICS},
        "ending": {"happy": HAPPY_WORDS, "sad": SAD_WORDS},
        "weather": dict(_WEATHER_WORDS),
        "mention": {t: frozenset((w,)) for t, w in _TITLE_WORDS.items()},
    }


def attributes(text: str) -> Facts:
    """Attributes of any text by word counts alone; None where the text shows neither value.

    Examples
    --------
    >>> attributes("They were overjoyed, for the rain had brought the oyster and the pearl.")["topic"]
    'sea'
    """
    words = re.findall(r"[a-z]+", text.lower())
    lists = attribute_lexicons()

    def most(name: str, among: list[str]) -> str | None:
        counts = {value: sum(w in found for w in among) for value, found in lists[name].items()}
        best = max(counts, key=counts.__getitem__)
        return best if counts[best] and list(counts.values()).count(counts[best]) == 1 else None

    pieces = units(text)
    last = re.findall(r"[a-z]+", pieces[-1].lower()) if pieces else []
    topic = most("topic", words)
    return {
        "style": most("style", words),
        "topic": topic,
        "ending": most("ending", last),
        "dialogue": "high" if text.count('"') >= 4 else "low",
        "weather": most("weather", words),
        "mention": topic is not None and _TITLE_WORDS[topic] in words,
    }


def concepts(story: Facts) -> dict[str, bool]:
    """The binary concepts of a story's facts."""
    shown: set[str] = set()
    for event, _ in story["events"]:
        shown |= EVENT_CONCEPTS[event.split(":")[0]]
    if story["cast"]["k"] in SPECIES:
        shown |= {"has_animal", "animal_hero"}
    if story["attributes"]["topic"] == "animals":
        shown.add("has_animal")
    return {concept: concept in shown for concept in CONCEPTS}


def valid(text: str) -> float:
    """Share of the text's characters that lie in sentences of the story grammar, in [0, 1].

    Examples
    --------
    >>> valid("The a a a a Sam")
    0.0
    """
    text = text.strip()
    if not text:
        return 0.0
    covered = sum(len(u) + 1 for u in units(text) if read_unit(u) is not None)
    return min(1.0, covered / (len(text) + 1))


def coherent(text: str) -> tuple[bool, str]:
    """Whether every sentence parses and the events replay without contradiction, and if not, why."""
    try:
        parse_story(text.strip())
    except ValueError as error:
        return False, str(error)
    return True, ""


def cut_opening(text: str) -> tuple[str, str]:
    """(prompt, completion): the opening sentence with its header, and the rest, which starts with a space."""
    head, newline, story = text.rstrip("\n").rpartition("\n")
    first = _UNIT.match(story)
    if first is None or first.end() == len(story):
        raise ValueError("text: no opening sentence followed by others in its last line")
    return head + newline + story[: first.end()], story[first.end() :]
