"""The formats made of stories: plain, tagged, for a reader, several, rewritten, scored, compared, ordered.

Exact strings (STORY is one paragraph; a completion starts after the boundary, with a space):

    story           STORY
    story_tagged    Style: simple. Topic: animals. Ending: happy. Dialogue: high. Weather: rain. (some)
                    STORY
    story_reader    Reader: likes animals and short words.
                    STORY
    stories_shared  Stories: / STORY / blank line / STORY ...    (2 to 4 stories that share 2 or 3 attributes)
    rewrite         Story: STORY / Problem: The words are too long. / Rewrite: STORY
    feedback        [Judge: likes happy endings most, then short words and rain.]
                    Story: STORY / Feedback: The ending is happy, but the words are long, and ... / Score: 4
    judge           A: STORY / B: STORY / Better for short words: A   (1 to 4 such lines)
    profile         Liked: STORY (3 to 5 times) / Profile: likes animals and short words.
    order_story     Nora painted a green bench near the town hall. ...  (9 to 16 events; some numbered)
    sort            3 to 16 events, then 1 to 4 times
                    A: SENTENCE / B: SENTENCE / Which came first? Answer: A
"""

from __future__ import annotations

import re

from refimpl.world.base import Facts, Format, Split
from refimpl.world.lexicon import COLORS, FIRST_NAMES
from refimpl.world.rng import Rng
from refimpl.world.stories import (
    ATTRIBUTES,
    change_story,
    parse_story,
    render_story,
    sample_attributes,
    sample_story,
)
from refimpl.world.story_forms import TOPIC_TITLES

# What a reader can like: (attribute, value) -> the words for it.
LIKES: dict[tuple[str, str], str] = {
    ("style", "simple"): "short words",
    ("style", "rich"): "long words",
    ("topic", "animals"): "animals",
    ("topic", "sea"): "the sea",
    ("topic", "food"): "food",
    ("topic", "machines"): "machines",
    ("ending", "happy"): "happy endings",
    ("ending", "sad"): "sad endings",
    ("dialogue", "high"): "much talking",
    ("dialogue", "low"): "little talking",
    ("weather", "rain"): "rain",
    ("weather", "snow"): "snow",
    ("weather", "wind"): "wind",
}
_LIKE_OF = {words: key for key, words in LIKES.items()}
_LIKED = ("style", "topic", "ending", "dialogue", "weather")  # the attributes that a header can name
_VALUES = {name: tuple(value for n, value in LIKES if n == name) for name in _LIKED}


def _draw_likes(rng: Rng, k: int) -> list[list[str]]:
    """k liked values of different attributes, as [attribute, value]."""
    return [[name, rng.choice(_VALUES[name])] for name in rng.sample(_LIKED, k)]


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _split_and(text: str) -> list[str]:
    head, _, last = text.rpartition(" and ")
    return [*head.split(", "), last] if head else [last]


def _likes_text(likes: list[list[str]]) -> str:
    return "likes " + _and([LIKES[name, value] for name, value in likes]) + "."


def _read_likes(text: str) -> list[list[str]]:
    if not (text.startswith("likes ") and text.endswith(".")):
        raise ValueError(f"text: {text!r} is not 'likes ... and ... .'")
    return [list(_like(words)) for words in _split_and(text[6:-1])]


def _like(words: str) -> tuple[str, str]:
    if words not in _LIKE_OF:
        raise ValueError(f"text: {words!r} is not one of {sorted(_LIKE_OF)}")
    return _LIKE_OF[words]


def _line(lines: list[str], start: str) -> str:
    """The rest of the next line, which must begin with `start`; takes it from `lines`."""
    if not lines or not lines[0].startswith(start):
        raise ValueError(
            f"text: expected a line that starts with {start!r}, found {lines[0] if lines else 'the end'!r}"
        )
    return lines.pop(0)[len(start) :]


def _lines(text: str) -> list[str]:
    if not text.endswith("\n"):
        raise ValueError("text: the document must end with a newline")
    return text[:-1].split("\n")


def _finish(lines: list[str]) -> None:
    if lines:
        raise ValueError(f"text: {lines[0]!r} after the end of the document")


# -------------------------------------------------------------------------------------- story, headers
def _render_plain(facts: Facts, rng: Rng) -> str:
    return render_story(facts, rng) + "\n"


def _parse_plain(text: str) -> Facts:
    lines = _lines(text)
    story = parse_story(_line(lines, ""))
    _finish(lines)
    return story


_TAG_CHANCE = {"style": 0.6, "topic": 0.6, "ending": 0.6, "dialogue": 0.25, "weather": 0.25}


def _sample_tagged(rng: Rng, split: Split) -> Facts:
    tags: list[str] = []
    while not tags:
        tags = [name for name, p in _TAG_CHANCE.items() if rng.chance(p)]
    return {"tags": tags, "story": sample_story(rng, split)}


def tag_line(attributes: Facts, tags: list[str]) -> str:
    """The header of a tagged story, without the newline.

    Examples
    --------
    >>> tag_line({"style": "simple", "ending": "sad"}, ["style", "ending"])
    'Style: simple. Ending: sad.'
    """
    return " ".join(f"{name.capitalize()}: {attributes[name]}." for name in _TAG_CHANCE if name in tags)


def _render_tagged(facts: Facts, rng: Rng) -> str:
    header = tag_line(facts["story"]["attributes"], facts["tags"])
    return f"{header}\n{render_story(facts['story'], rng)}\n"


def _parse_tagged(text: str) -> Facts:
    lines = _lines(text)
    header, story = _line(lines, ""), parse_story(_line(lines, ""))
    _finish(lines)
    tags = [name.lower() for name in re.findall(r"(\w+):", header)]
    if not tags or any(t not in _TAG_CHANCE for t in tags) or header != tag_line(story["attributes"], tags):
        raise ValueError(f"text: the header {header!r} is no tag line that the story obeys")
    return {"tags": tags, "story": story}


def _sample_reader(rng: Rng, split: Split) -> Facts:
    likes = _draw_likes(rng, rng.between(1, 3))
    return {"likes": likes, "story": sample_story(rng, split, dict(likes))}


def _obeys(story: Facts, likes: list[list[str]]) -> bool:
    return all(story["attributes"][name] == value for name, value in likes)


def _render_reader(facts: Facts, rng: Rng) -> str:
    return f"Reader: {_likes_text(facts['likes'])}\n{render_story(facts['story'], rng)}\n"


def _parse_reader(text: str) -> Facts:
    lines = _lines(text)
    likes, story = _read_likes(_line(lines, "Reader: ")), parse_story(_line(lines, ""))
    _finish(lines)
    if not _obeys(story, likes):
        raise ValueError("text: the story does not obey its Reader line")
    return {"likes": likes, "story": story}


# ---------------------------------------------------------------------------- several stories together
def _group(rng: Rng, split: Split, n: int, likes: list[list[str]]) -> list[Facts]:
    """n stories that share exactly these values: every other attribute of `_LIKED` differs somewhere."""
    while True:
        drawn = [{**sample_attributes(rng), **dict(likes)} for _ in range(n)]
        shared = {name for name in _LIKED if len({a[name] for a in drawn}) == 1}
        if shared == {name for name, _ in likes}:
            return [sample_story(rng, split, a) for a in drawn]


def _shared(stories: list[Facts]) -> list[list[str]]:
    return [
        [name, stories[0]["attributes"][name]]
        for name in _LIKED
        if len({s["attributes"][name] for s in stories}) == 1
    ]


def _sample_shared(rng: Rng, split: Split) -> Facts:
    n = rng.between(2, 4)
    return {"stories": _group(rng, split, n, _draw_likes(rng, rng.between(2, 3)))}


def _render_shared(facts: Facts, rng: Rng) -> str:
    return "Stories:\n" + "\n\n".join(render_story(story, rng) for story in facts["stories"]) + "\n"


def _parse_shared(text: str) -> Facts:
    lines = _lines(text)
    if lines[0] != "Stories:":
        raise ValueError(f"text: {lines[0]!r} is not 'Stories:', so it is not a 'stories_shared' document")
    del lines[0]
    stories = [parse_story(line) for line in "\n".join(lines).split("\n\n")]
    if len(stories) < 2:
        raise ValueError("text: a single story, where two to four are due")
    return {"stories": stories}


def _sample_profile(rng: Rng, split: Split) -> Facts:
    n = rng.between(3, 5)
    likes = _draw_likes(rng, 2)
    return {"likes": likes, "stories": _group(rng, split, n, likes)}


def _render_profile(facts: Facts, rng: Rng) -> str:
    liked = "".join(f"Liked: {render_story(story, rng)}\n" for story in facts["stories"])
    return f"{liked}Profile: {_likes_text(facts['likes'])}\n"


def _parse_profile(text: str) -> Facts:
    lines, stories = _lines(text), []
    while lines and lines[0].startswith("Liked: "):
        stories.append(parse_story(_line(lines, "Liked: ")))
    likes = _read_likes(_line(lines, "Profile: "))
    _finish(lines)
    if not stories or sorted(likes) != sorted(_shared(stories)):
        raise ValueError("text: the profile is not what the liked stories share")
    return {"likes": likes, "stories": stories}


# ---------------------------------------------------------------------------------- rewrite and judges
_PROBLEMS: dict[tuple[str, str], tuple[str, ...]] = {
    ("style", "rich"): (
        "The words are too long.",
        "It needs shorter words.",
        "Such long words are hard to read.",
    ),
    ("style", "simple"): ("The words are too short.", "It needs longer words.", "Such short words are dull."),
    ("ending", "sad"): (
        "The ending is too sad.",
        "It needs a happy ending.",
        "Nobody likes so sad an ending.",
    ),
    ("ending", "happy"): (
        "The ending is too happy.",
        "It needs a sad ending.",
        "So happy an ending is not true.",
    ),
    ("dialogue", "low"): ("Nobody talks enough.", "It needs more talking.", "The friends should talk more."),
    ("dialogue", "high"): (
        "There is too much talking.",
        "It needs less talking.",
        "The friends should talk less.",
    ),
}
_PROBLEM_OF = {text: key for key, texts in _PROBLEMS.items() for text in texts}


def _sample_rewrite(rng: Rng, split: Split) -> Facts:
    story, name = sample_story(rng, split), rng.choice(("style", "ending", "dialogue"))
    return {"story": story, "problem": name, "rewrite": change_story(story, name, rng)}


def _render_rewrite(facts: Facts, rng: Rng) -> str:
    story, name = facts["story"], facts["problem"]
    problem = rng.choice(_PROBLEMS[name, story["attributes"][name]])
    before, after = render_story(story, rng), render_story(facts["rewrite"], rng)
    return f"Story: {before}\nProblem: {problem}\nRewrite: {after}\n"


def _parse_rewrite(text: str) -> Facts:
    lines = _lines(text)
    story, problem = parse_story(_line(lines, "Story: ")), _line(lines, "Problem: ")
    rewrite = parse_story(_line(lines, "Rewrite: "))
    _finish(lines)
    name, value = _PROBLEM_OF.get(problem, ("", ""))
    changed = [n for n in ATTRIBUTES if story["attributes"][n] != rewrite["attributes"][n]]
    if changed != [name] or story["attributes"][name] != value:
        raise ValueError(f"text: the problem {problem!r} is not what the rewrite changed ({changed})")
    return {"story": story, "problem": name, "rewrite": rewrite}


# (what is said of a story that satisfies the judge, of one that does not)
_REMARKS: dict[tuple[str, str], tuple[str, str]] = {
    ("style", "simple"): ("the words are short", "the words are long"),
    ("style", "rich"): ("the words are rich", "the words are plain"),
    ("ending", "happy"): ("the ending is happy", "the ending makes me sad"),
    ("ending", "sad"): ("the ending is sad", "the ending is too sweet"),
    ("dialogue", "high"): ("they talk a lot", "they hardly talk"),
    ("dialogue", "low"): ("they are quiet", "they talk too much"),
    **{("topic", t): (f"it is about {w}", f"it is not about {w}") for t, w in TOPIC_TITLES.items()},
    **{("weather", w): (f"there is {w}", f"there is no {w}") for w in ("rain", "snow", "wind")},
}
_REMARK_OF = {
    text: (key, good)
    for key, pair in _REMARKS.items()
    for good, text in zip((True, False), pair, strict=True)
}
WEIGHTS = (2, 1, 1)  # of a judge's first, second and third wish; score = 1 + what is satisfied


def score(attributes: Facts, wishes: list[list[str]]) -> int:
    """The judge's score from 1 to 5: one, and two for the first wish, one for each of the other two.

    Examples
    --------
    >>> wishes = [["ending", "sad"], ["style", "simple"], ["weather", "rain"]]
    >>> score({"ending": "sad", "style": "rich", "weather": "rain"}, wishes)
    4
    """
    return 1 + sum(w for w, (name, value) in zip(WEIGHTS, wishes, strict=True) if attributes[name] == value)


def feedback_text(attributes: Facts, wishes: list[list[str]]) -> str:
    """The judge's remarks in the order of its wishes; "but" stands where praise and blame meet."""
    out, before = "", None
    for name, value in wishes:
        good = attributes[name] == value
        remark = _REMARKS[name, value][0 if good else 1]
        if before is None:
            out = remark[0].upper() + remark[1:]
        else:
            out += (", and " if good == before else ", but ") + remark
        before = good
    return out + "."


def _read_feedback(text: str) -> list[list[str]]:
    wishes = []
    for i, remark in enumerate(re.split(r", (?:and|but) ", text.removesuffix("."))):
        key = _REMARK_OF.get(remark if i else remark[0].lower() + remark[1:])
        if key is None:
            raise ValueError(f"text: {remark!r} is no remark of a judge")
        wishes.append(list(key[0]))
    return wishes


def _sample_feedback(rng: Rng, split: Split) -> Facts:
    stated = rng.chance(0.4)
    n = 1 if stated else rng.between(1, 4)
    return {
        "stated": stated,
        "wishes": _draw_likes(rng, 3),
        "stories": [sample_story(rng, split) for _ in range(n)],
    }


def _render_feedback(facts: Facts, rng: Rng) -> str:
    wishes, out = facts["wishes"], ""
    if facts["stated"]:
        first, second, third = (LIKES[name, value] for name, value in wishes)
        out = f"Judge: likes {first} most, then {second} and {third}.\n"
    for story in facts["stories"]:
        remarks = feedback_text(story["attributes"], wishes)
        points = score(story["attributes"], wishes)
        out += f"Story: {render_story(story, rng)}\nFeedback: {remarks}\nScore: {points}\n"
    return out


def _parse_feedback(text: str) -> Facts:
    lines, stories, wishes = _lines(text), [], None
    stated = lines[0].startswith("Judge: ")
    if stated:
        match = re.fullmatch(r"likes (.+) most, then (.+) and (.+)\.", _line(lines, "Judge: "))
        if match is None:
            raise ValueError("text: the Judge line is not 'likes ... most, then ... and ... .'")
        wishes = [list(_like(words)) for words in match.groups()]
    while lines:
        story, remarks = parse_story(_line(lines, "Story: ")), _line(lines, "Feedback: ")
        given = _line(lines, "Score: ")
        wishes = wishes or _read_feedback(remarks)
        if remarks != feedback_text(story["attributes"], wishes) or given != str(
            score(story["attributes"], wishes)
        ):
            raise ValueError(f"text: feedback {remarks!r} and score {given!r} do not fit the story")
        stories.append(story)
    if not stories:
        raise ValueError("text: no story to judge")
    return {"stated": stated, "wishes": wishes, "stories": stories}


def _sample_judge(rng: Rng, split: Split) -> Facts:
    """Two stories and wishes that tell them apart: up to four in training, one in evaluation."""
    wishes, stories = _draw_likes(rng, rng.between(1, 4) if split == "train" else 1), ({}, {})
    answers = ""
    for name, value in wishes:
        other = rng.choice([v for v in ATTRIBUTES[name] if v != value])
        answer = rng.below(2)
        stories[answer][name], stories[1 - answer][name] = value, other
        answers += "AB"[answer]
    return {"wishes": wishes, "stories": [sample_story(rng, split, s) for s in stories], "answers": answers}


def _render_judge(facts: Facts, rng: Rng) -> str:
    a, b = (render_story(story, rng) for story in facts["stories"])
    lines = [
        f"Better for {LIKES[tuple(wish)]}: {answer}\n"
        for wish, answer in zip(facts["wishes"], facts["answers"], strict=True)
    ]
    return f"A: {a}\nB: {b}\n{''.join(lines)}"


def _parse_judge(text: str) -> Facts:
    lines = _lines(text)
    stories = [parse_story(_line(lines, "A: ")), parse_story(_line(lines, "B: "))]
    wishes, answers = [], ""
    while lines or not wishes:
        words, _, answer = _line(lines, "Better for ").partition(": ")
        name, value = _like(words)
        fits = [s["attributes"][name] == value for s in stories]
        if fits not in ([True, False], [False, True]) or answer != "AB"[fits.index(True)]:
            raise ValueError(f"text: the answer {answer!r} does not follow from the stories")
        wishes.append([name, value])
        answers += answer
    return {"wishes": wishes, "stories": stories, "answers": answers}


# ------------------------------------------------------------------------------------- order of events
_ACTS = {
    "painted": "bench fence door boat sign cart wall gate",
    "carried": "basket bucket ladder lantern bundle crate drum chest",
    "found": "button coin feather whistle marble glove key ribbon",
    "washed": "blanket window bottle jacket plate kettle rug shirt",
    "drew": "dragon tower flower pirate star bridge crown wizard",
    "bought": "pencil hat candle mirror brush scarf comb needle",
    "sold": "clock chair lamp violin teapot stool carpet vase",
    "mended": "kite net shoe roof tent sail chain hammock",
    "hid": "letter medal map necklace diary present ring locket",
    "built": "snowman castle bridge hut shelf nest swing tower",
    "dropped": "mug bowl spoon jar pie cake cup parcel",
    "fed": "goat donkey parrot rabbit swan turtle pony lamb",
    "greeted": "farmer nurse sailor teacher baker miner poet clown",
    "planted": "tulip rose bean oak pear cherry lily fern",
    "photographed": "balloon train steeple rainbow windmill statue parade ship",
    "borrowed": "saw spade rope hammer compass tray flute barrel",
}  # fmt: skip
_VERBS = tuple(_ACTS)
_OBJECTS = {verb: tuple(objects.split()) for verb, objects in _ACTS.items()}
_LOOKS = (*COLORS, "broken", "shiny", "dusty", "striped", "wooden", "heavy", "muddy", "crooked")
_WHERE = tuple(f"{p} the {q}" for p in ("near", "behind", "beside", "outside") for q in (
    "stone bridge", "town hall", "bus stop", "corn field", "tall fountain", "village school", "duck pond",
    "iron gate",
    "railway station", "flower shop", "empty theater", "chapel wall",
))  # fmt: skip
_EVENT = re.compile(
    r"(\w+) (\w+) an? (\w+) (\w+) (\w+ the \w+ \w+)\.|(\w+ the \w+ \w+) (\w+) (\w+) an? (\w+) (\w+)\."
)


def _sample_order(rng: Rng, split: Split) -> Facts:
    return _draw_events(rng, rng.between(9, 16))


def _draw_events(rng: Rng, n: int) -> Facts:
    people = rng.sample(FIRST_NAMES, rng.between(1, 3))
    events, seen = [], set()
    while len(events) < n:
        verb = rng.choice(_VERBS)
        event = [rng.choice(people), verb, rng.choice(_LOOKS), rng.choice(_OBJECTS[verb]), rng.choice(_WHERE)]
        if (verb, event[3]) not in seen:
            seen.add((verb, event[3]))
            events.append(event)
    return {"numbered": rng.chance(0.25), "events": events}


def _event_text(event: list[str], place_first: bool) -> str:
    name, verb, look, thing, where = event
    what = f"{name} {verb} {'an' if look[0] in 'aeiou' else 'a'} {look} {thing}"
    return f"{where[0].upper()}{where[1:]} {what}." if place_first else f"{what} {where}."


def _event_texts(facts: Facts, rng: Rng) -> list[str]:
    return [_event_text(event, rng.chance(0.3)) for event in facts["events"]]


def _order_text(facts: Facts, sentences: list[str]) -> str:
    if facts["numbered"]:
        return "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1)) + "\n"
    return " ".join(sentences) + "\n"


def _render_order(facts: Facts, rng: Rng) -> str:
    return _order_text(facts, _event_texts(facts, rng))


def _read_order(lines: list[str]) -> tuple[Facts, list[str]]:
    numbered = lines[0].startswith("1. ")
    if numbered:
        sentences = [_line(lines, f"{i}. ") for i in range(1, 1 + sum(line[:1].isdigit() for line in lines))]
    else:
        sentences = [s + "." for s in _line(lines, "").removesuffix(".").split(". ")]
    return {"numbered": numbered, "events": [_read_event(s) for s in sentences]}, sentences


def _read_event(sentence: str) -> list[str]:
    match = _EVENT.fullmatch(sentence)
    if match is None:
        raise ValueError(f"text: no event reads {sentence!r}")
    if match[1]:
        event = [match[1], match[2], match[3], match[4], match[5]]
    else:
        event = [match[7], match[8], match[9], match[10], match[6][0].lower() + match[6][1:]]
    name, verb, look, thing, where = event
    known = name in FIRST_NAMES and look in _LOOKS and thing in _OBJECTS.get(verb, ()) and where in _WHERE
    if not known or sentence not in (_event_text(event, False), _event_text(event, True)):
        raise ValueError(f"text: unknown words in {sentence!r}")
    return event


def _parse_order(text: str) -> Facts:
    lines = _lines(text)
    facts, _ = _read_order(lines)
    _finish(lines)
    return facts


_BINS = ((0.0, 1 / 4), (1 / 4, 1 / 3), (1 / 3, 1 / 2), (1 / 2, 1 / 1.25))  # of the number of events


def distance_bin(i: int, j: int, n: int) -> int:
    """The bin (0 to 3) of the distance between events i and j of n; 3 also holds what lies beyond."""
    share = abs(i - j) / n
    return next((b for b, (_, high) in enumerate(_BINS) if share <= high), 3)


def _draw_pair(rng: Rng, n: int) -> list[int]:
    """Two of n events at a distance from a bin drawn at random (of those that n events can have)."""
    gaps: list[int] = []
    while not gaps:
        low, high = _BINS[rng.below(4)]
        gaps = [d for d in range(1, n) if low * n < d <= high * n]
    gap = rng.choice(gaps)
    i = rng.below(n - gap)
    return [i, i + gap] if rng.chance(0.5) else [i + gap, i]


def _sample_sort(rng: Rng, split: Split) -> Facts:
    """One pair of a list of 9 to 16 events; half of the training lists are shorter and ask up to four times
    over.
    """
    short = split == "train" and rng.chance(0.5)
    facts = _draw_events(rng, rng.between(3, 8)) if short else _sample_order(rng, split)
    n = len(facts["events"])
    pairs = [_draw_pair(rng, n) for _ in range(rng.between(1, 4) if short else 1)]
    return {**facts, "pairs": pairs, "answers": "".join("A" if i < j else "B" for i, j in pairs)}


def _render_sort(facts: Facts, rng: Rng) -> str:
    sentences = _event_texts(facts, rng)
    out = _order_text(facts, sentences)
    for (i, j), answer in zip(facts["pairs"], facts["answers"], strict=True):
        out += f"A: {sentences[i]}\nB: {sentences[j]}\nWhich came first? Answer: {answer}\n"
    return out


def _parse_sort(text: str) -> Facts:
    lines = _lines(text)
    facts, sentences = _read_order(lines)
    pairs, answers = [], ""
    while lines or not pairs:
        segments = [_line(lines, "A: "), _line(lines, "B: ")]
        answers += _line(lines, "Which came first? Answer: ")
        if any(s not in sentences for s in segments):
            raise ValueError("text: a segment is not in the story")
        pairs.append([sentences.index(s) for s in segments])
        if answers[-1:] != ("A" if pairs[-1][0] < pairs[-1][1] else "B"):
            raise ValueError(f"text: the answer {answers[-1:]!r} is wrong")
    return {**facts, "pairs": pairs, "answers": answers}


FORMATS: list[Format] = [
    Format(
        "story",
        sample_story,
        _render_plain,
        _parse_plain,
        None,
        ("alignment 1-4, 10, 11", "interp E9", "interp C1"),
    ),
    Format("story_tagged", _sample_tagged, _render_tagged, _parse_tagged, None, ("alignment 6",)),
    Format(
        "story_reader", _sample_reader, _render_reader, _parse_reader, None, ("alignment 6", "alignment 7")
    ),
    Format("stories_shared", _sample_shared, _render_shared, _parse_shared, None, ("alignment 6",)),
    Format("rewrite", _sample_rewrite, _render_rewrite, _parse_rewrite, "Rewrite:", ("alignment 6",)),
    Format(
        "feedback",
        _sample_feedback,
        _render_feedback,
        _parse_feedback,
        "Score:",
        ("alignment 6", "alignment 9"),
    ),
    Format("judge", _sample_judge, _render_judge, _parse_judge, ":", ("alignment 5", "alignment 6")),
    Format(
        "profile",
        _sample_profile,
        _render_profile,
        _parse_profile,
        "Profile:",
        ("alignment 6", "alignment 7"),
    ),
    Format("order_story", _sample_order, _render_order, _parse_order, None, ("interp E8",)),
    Format("sort", _sample_sort, _render_sort, _parse_sort, "Answer:", ("interp E8", "interp B7")),
]
