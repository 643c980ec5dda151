"""What can happen in a story: event types, what each needs and what it changes, and the concepts it shows.

A story is a chain of events over a small state. `RULES[event]` is (what must hold before, what holds after);
`replay` runs a chain and says whether it contradicts itself. A precondition that an earlier event made true
is a cause-effect link.
"""

from __future__ import annotations

MOODS = ("worry", "anger", "courage")
WEATHERS = ("rain", "snow", "wind")
HAPPY_ENDS = ("end_laugh", "end_proud", "end_hug", "end_party")
SAD_ENDS = ("end_cry", "end_alone", "end_regret", "end_gloomy")

# plot -> (state of its object before, after the trouble, when all goes well, when it does not)
PLOTS: dict[str, tuple[str, str, str, str]] = {
    "lost": ("x with them", "x missing", "x with them", "x missing for good"),
    "stuck": ("x with them", "x out of reach", "x with them", "x gone"),
    "broken": ("m planned", "m in pieces", "m whole", "m in pieces for good"),
    "race": ("race ahead", "race nearly lost", "race won", "race lost"),
    "road": ("road open", "road closed", "goods delivered", "goods not delivered"),
    "shy": ("newcomer unknown", "newcomer shy", "newcomer friend", "newcomer gone"),
    "secret": ("secret kept", "secret out", "secret forgiven", "secret not forgiven"),
    "recipe": ("m planned", "m spoiled", "m liked", "m ruined"),
    "rescue": ("h well", "h trapped", "h free", "h hurt"),
    "trade": ("x with them", "x traded away", "x with them", "x gone"),
    "blame": ("x with them", "C blamed", "C and P friends", "C and P apart"),
    "thief": ("x with them", "x stolen", "x with them", "x gone"),
    "fear": ("x far", "x in the dark", "x with them", "x left behind"),
    "map": ("x buried", "x not found", "x with them", "x taken by others"),
    "show": ("show planned", "show halted", "show saved", "show failed"),
    "share": ("x with them", "h in need", "h grateful", "h ungrateful"),
}


def _rules() -> dict[str, tuple[frozenset[str], tuple[str, ...]]]:
    """event -> (facts it needs, facts it makes true)."""
    rules = {
        "open_day": ((), ("P here",)),
        "open_night": ((), ("P here",)),
        "friend": (("P here",), ("C here",)),
    }
    for mood in MOODS:
        rules[mood] = (("P here", "C here", "trouble"), (f"mood {mood}",))
    for weather in WEATHERS:
        rules[weather] = (("P here", "C here", "trouble"), (f"weather {weather}",))
    for plot, (_, trouble, won, lost) in PLOTS.items():
        rules[plot] = (("P here", "C here"), ("trouble", trouble))
        rules[f"{plot}.idea"] = (("C here", trouble), (f"plan {plot}",))
        rules[f"{plot}.win"] = ((trouble, f"plan {plot}"), ("result good", won))
        rules[f"{plot}.lose"] = ((trouble, f"plan {plot}"), ("result bad", lost))
    for end in HAPPY_ENDS:
        rules[end] = (("P here", "C here", "result good"), ("over",))
    for end in SAD_ENDS:
        rules[end] = (("P here", "C here", "result bad"), ("over",))
    return {event: (frozenset(need), after) for event, (need, after) in rules.items()}


RULES = _rules()
_GIVEN = frozenset(("P here", "C here"))  # presence is a condition, not a cause


def replay(events: list[str]) -> tuple[bool, str, int]:
    """Run a chain of event types: (no contradiction?, reason, number of cause-effect links).

    Examples
    --------
    >>> replay(["open_day", "friend", "lost", "lost.idea", "lost.win", "end_hug"])
    (True, '', 4)
    >>> replay(["open_day", "lost"])
    (False, "event 'lost' needs 'C here'", 0)
    """
    state: set[str] = set()
    links = 0
    for event in events:
        if event not in RULES:
            return False, f"unknown event {event!r}", links
        if "over" in state:
            return False, f"event {event!r} after the end", links
        need, after = RULES[event]
        for fact in sorted(need):
            if fact not in state:
                return False, f"event {event!r} needs {fact!r}", links
        if event.endswith((".win", ".lose")) and state & {"result good", "result bad"}:
            return False, f"event {event!r} after a result", links
        if event in PLOTS and "trouble" in state:
            return False, f"event {event!r} is a second trouble", links
        if event.startswith("open_") and state:
            return False, f"event {event!r} is not at the beginning", links
        links += len(need - _GIVEN - {"trouble"}) + ("trouble" in need)
        if event.endswith((".win", ".lose")):  # the trouble is over: what it made true holds no longer
            state.discard(PLOTS[event.split(".")[0]][1])
        state.update(after)
    if "over" not in state:
        return False, "the story has no end", links
    return True, "", links


_PLOT_CONCEPTS = {
    "object_lost": "lost stuck thief blame trade",
    "something_breaks": "broken recipe",
    "contest": "race show",
    "newcomer": "shy",
    "secret": "secret",
    "made_thing": "broken recipe",
    "danger": "rescue fear",
    "trade": "trade",
    "apology": "secret blame",
    "gift": "share shy",
    "treasure": "map",
    "journey": "road",
    "thief": "thief",
    "ghost": "fear",
}
_EVENT_CONCEPTS = {
    "object_found": "lost.win stuck.win trade.win blame.win thief.win fear.win map.win",
    "someone_cries": "end_cry",
    "someone_laughs": "end_laugh",
    "party": "end_party",
    "hug": "end_hug",
    "proud": "end_proud",
    "lonely": "end_alone",
    "regret": "end_regret",
    "night": "open_night",
    "has_rain": "rain",
    "has_snow": "snow",
    "has_wind": "wind",
    "scared": "worry",
    "angry": "anger",
    "brave": "courage",
}
CONCEPTS = ("has_animal", "animal_hero", *_PLOT_CONCEPTS, *_EVENT_CONCEPTS)


def _table() -> dict[str, frozenset[str]]:
    table: dict[str, set[str]] = {event: set() for event in RULES}
    for concept, plots in _PLOT_CONCEPTS.items():
        for plot in plots.split():
            table[plot].add(concept)
    for concept, events in _EVENT_CONCEPTS.items():
        for event in events.split():
            table[event].add(concept)
    return {event: frozenset(found) for event, found in table.items()}


EVENT_CONCEPTS = _table()
