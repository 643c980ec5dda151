"""Questions about earlier turns of a dialogue, answered by replaying its log."""

from __future__ import annotations

from refimpl.world.dialogue_phrases import KIN
from refimpl.world.lexicon import (
    ANIMALS,
    COLORS,
    COMPANIES,
    FOODS,
    HOBBIES,
    JOBS,
    NUMBER_WORDS,
    OBJECTS,
    TOWNS,
)
from refimpl.world.phrasebook import NAME, WORD, PhraseIndex, Phrases, article
from refimpl.world.rng import Rng
from refimpl.world.session_dates import LONG_DATE, long_date

UNKNOWN = "unknown"
# relation -> (candidates, the acts that state it, the field with the value); "kin_" relations have a subject
STATES = {
    "home": (TOWNS, ("lives", "moved"), "town"),
    "job": (JOBS, ("works_as", "new_job"), "job"),
    "company": (COMPANIES, ("works_at",), "company"),
    "food": (FOODS, ("favourite_food",), "food"),
    "color": (COLORS, ("favourite_color",), "color"),
    "hobby": (HOBBIES, ("hobby",), "hobby"),
    "kin_home": (TOWNS, ("kin_lives", "kin_moved"), "town"),
    "kin_job": (JOBS, ("kin_works",), "job"),
}
STATED_BY = {act: rel for rel, (_, acts, _) in STATES.items() for act in acts}
JOIN = {"kin_home": "kin_job", "kin_job": "kin_home"}
EVENTS = {"moved": "town", "bought": "object", "lost": "object", "visited": "town", "plan_trip": "town"}

# The last form of every question is held out of the training split.
QUESTIONS = {
    "home": Phrases(
        "Where do I live?\nIn which town do I live now?\nWhat is my home town at the moment?\n"
        "Do you know where my house is?"
    ),
    "job": Phrases("What is my job?\nWhat do I work as?\nHow do I earn my living?\nWhich trade am I in?"),
    "company": Phrases(
        "Which company do I work for?\nWhat is my company called?\nFor which firm do I work?\n"
        "Who pays me every month?"
    ),
    "food": Phrases(
        "What is my favourite food?\nWhich food do I like best?\nWhat do I like to eat most?\n"
        "What should you cook for me?"
    ),
    "color": Phrases(
        "What is my favourite color?\nWhich color do I like best?\nWhat color do I love?\n"
        "In which color should my room be?"
    ),
    "hobby": Phrases(
        "What is my hobby?\nWhat do I do in my free time?\nWhich hobby do I have now?\n"
        "How do I spend my evenings?"
    ),
    "kin_home": Phrases(
        "Where does my {kin} {name} live?\nIn which town does {name} live?\nWhere is the home of {name}?\n"
        "Which town should I go to if I want to see {name}?",
        kin="|".join(KIN),
    ),
    "kin_job": Phrases(
        "What is the job of {name}?\nWhat does my {kin} {name} work as?\nHow does {name} earn a living?\n"
        "Which trade is {name} in?",
        kin="|".join(KIN),
    ),
    "before_home": Phrases(
        "Where did I live before?\nIn which town did I live before I moved?\nWhere was my old home?"
    ),
    "before_job": Phrases(
        "What was my job before?\nWhat did I work as before?\nWhich trade was I in earlier?"
    ),
    "before_food": Phrases(
        "What was my favourite food before?\nWhich food did I like best before?\n"
        "What did I like to eat most in the past?"
    ),
    "when_moved": Phrases(
        "When did I move to {town}?\nOn which day did I move to {town}?\n"
        "What is the date of my move to {town}?"
    ),
    "when_bought": Phrases(
        "When did I buy the {object}?\nOn which day did I buy my {object}?\n"
        "What is the date on which I got the {object}?"
    ),
    "when_lost": Phrases(
        "When did I lose the {object}?\nOn which day did I lose my {object}?\n"
        "Since which day is my {object} gone?"
    ),
    "when_visited": Phrases(
        "When was I in {town}?\nOn which day did I visit {town}?\nWhat is the date of my visit to {town}?"
    ),
    "when_plan_trip": Phrases(
        "When will I travel to {town}?\nOn which day do I go to {town}?\n"
        "What is the date of my trip to {town}?"
    ),
    "first_bought": Phrases(
        "Which did I buy first, the {object} or the {other}?\n"
        "What came first, buying the {object} or buying the {other}?\n"
        "Did I buy the {object} or the {other} first?",
        other=WORD,
    ),
    "pet_name": Phrases(
        "What is the name of my {animal}?\nWhat is my {animal} called?\nHow do I call my {animal}?",
        animal="|".join(ANIMALS),
    ),
    "kin_name": Phrases(
        "What is the name of my {kin}?\nWhat is my {kin} called?\nHow do I call my {kin}?", kin="|".join(KIN)
    ),
    "count_bought": Phrases(
        "How many things have I bought?\nHow many things did I tell you that I bought?\n"
        "Count the things I bought."
    ),
    "count_moves": Phrases("How many times did I move?\nHow often have I moved?\nCount my moves."),
    "kin_job_in": Phrases(
        "What is the job of my relative in {town}?\nWhat does my relative from {town} work as?\n"
        "Which trade is my relative who lives in {town} in?"
    ),
    "kin_home_of": Phrases(
        "Where does my relative live who is {a_job}?\nIn which town does the {job} of my family live?\n"
        "Where is the home of my relative, the {job}?"
    ),
    "count_pets": Phrases(
        "How many pets have I told you about?\nHow many animals of mine do you know?\nCount my pets."
    ),
}
_INDEX = PhraseIndex(QUESTIONS)
ANSWERS = Phrases(
    "It is {value}.\nYou told me: {value}.\nIf I remember well, {value}.\n{value}, as you said.\n"
    "I have it here: {value}.",
    value=f"(?:{LONG_DATE}|{NAME}|[a-z]+)",
)
DONT_KNOW = ("You never told me.", "I do not know that yet.", "I cannot know that.", "You have not said so.")


class Log:
    """Everything a user has stated so far, with the place of each statement.

    `states[(subject, relation)]` and `events[(act, value)]` are lists of (value or ISO date, ref) in the
    order told; a ref is [session, turn of the session].
    """

    def __init__(self) -> None:
        self.states: dict[tuple[str, str], list[tuple[str, list[int]]]] = {}
        self.events: dict[tuple[str, str], list[tuple[str, list[int]]]] = {}
        self.pets: dict[str, list[tuple[str, list[int]]]] = {}
        self.kin: dict[str, tuple[str, list[int]]] = {}

    def add(self, turn: dict, ref: list[int]) -> None:
        """Take in one turn of the user."""
        act = turn["act"]
        relation = STATED_BY.get(act)
        if relation is not None:
            key = (turn.get("name", "I"), relation)
            self.states.setdefault(key, []).append((turn[STATES[relation][2]], ref))
        if act in EVENTS:
            self.events.setdefault((act, turn[EVENTS[act]]), []).append((turn["when"], ref))
        if act == "has_pet":
            self.pets.setdefault(turn["animal"], []).append((turn["pet"], ref))
        if "kin" in turn:
            self.kin.setdefault(turn["kin"], (turn["name"], ref))

    def history(self, subject: str, relation: str) -> list[tuple[str, list[int]]]:
        """The statements that changed the value, oldest first."""
        told = self.states.get((subject, relation), ())
        return [x for i, x in enumerate(told) if i == 0 or x[0] != told[i - 1][0]]

    def _all(self, wanted: str) -> list[tuple[str, str, list[int]]]:
        """(value, ISO date, ref) of every event of the act."""
        return [(v, *one) for (act, v), all_ in self.events.items() if act == wanted for one in all_]

    def bought(self) -> list[tuple[str, str, list[int]]]:
        """(object, ISO date, ref) of every purchase."""
        return self._all("bought")

    def answer(self, question: dict) -> tuple[str, list[list[int]]]:
        """The answer ("unknown" when nothing was told) and the refs that support it."""
        ask = question["ask"]
        if ask in STATES or ask.startswith("before_"):
            relation, back = (ask, 1) if ask in STATES else (ask[7:], 2)
            found = self.history(question.get("name", "I"), relation)
            if len(found) < back:
                return UNKNOWN, []
            return found[-back][0], [ref for _, ref in found[-back:]]
        if ask.startswith("when_"):
            act = ask[5:]
            found = self.events.get((act, question[EVENTS[act]]))
            return (long_date(found[-1][0]), [found[-1][1]]) if found else (UNKNOWN, [])
        if ask == "first_bought":
            one, two = (self.events[("bought", question[k])][0] for k in ("object", "other"))
            return question["object" if one[0] < two[0] else "other"], [one[1], two[1]]
        if ask == "pet_name":
            found = self.pets.get(question["animal"])
            return (found[-1][0], [found[-1][1]]) if found else (UNKNOWN, [])
        if ask == "kin_name":
            found = self.kin.get(question["kin"])
            return (found[0], [found[1]]) if found else (UNKNOWN, [])
        if ask in ("kin_job_in", "kin_home_of"):
            known, wanted = ("home", "job") if ask == "kin_job_in" else ("job", "home")
            value = question["town" if known == "home" else "job"]
            for subject in self._relatives(known, value):
                if told := self.history(subject, f"kin_{wanted}"):
                    return told[-1][0], [self.history(subject, f"kin_{known}")[-1][1], told[-1][1]]
            return UNKNOWN, []
        if ask == "count_bought":
            refs = [ref for _, _, ref in self.bought()]
        elif ask == "count_moves":
            refs = [ref for _, _, ref in self._all("moved")]
        else:
            refs = [pets[0][1] for pets in self.pets.values()]
        return (NUMBER_WORDS[len(refs)] if len(refs) <= 12 else "many"), refs

    def _relatives(self, relation: str, value: str) -> list[str]:
        """The relatives whose last known home or job is `value`."""
        found = [s for s, r in self.states if r == f"kin_{relation}"]
        return [s for s in found if self.states[s, f"kin_{relation}"][-1][0] == value]

    def possible(self) -> list[dict]:
        """Every answerable question, each with one and only one answer."""
        found: list[dict] = []
        for (subject, relation), told in self.states.items():
            who = {} if subject == "I" else {"name": subject}
            found.append({"ask": relation, **who})
            if f"before_{relation}" in QUESTIONS and any(v != told[0][0] for v, _ in told):
                found.append({"ask": f"before_{relation}"})
        for (act, value), all_ in self.events.items():
            if len(all_) == 1:
                found.append({"ask": f"when_{act}", EVENTS[act]: value})
        things = {v: days for (act, v), days in self.events.items() if act == "bought" and len(days) == 1}
        last = list(things)[-5:]
        pairs = [(a, b) for a in last for b in last if a < b and things[a][0][0] != things[b][0][0]]
        found += [{"ask": "first_bought", "object": a, "other": b} for a, b in pairs[:6]]
        found += [
            {"ask": "pet_name", "animal": animal} for animal, pets in self.pets.items() if len(pets) == 1
        ]
        found += [{"ask": "kin_name", "kin": kin} for kin in self.kin]
        for ask, n in (
            ("count_bought", len(self.bought())),
            ("count_moves", len(self._all("moved"))),
            ("count_pets", len(self.pets)),
        ):
            if 1 < n <= 12:
                found.append({"ask": ask})
        for subject, relation in self.states:
            if relation in ("kin_home", "kin_job") and (subject, JOIN[relation]) in self.states:
                value = self.states[subject, relation][-1][0]
                if self._relatives(relation[4:], value) == [subject]:
                    ask, field = ("kin_job_in", "town") if relation == "kin_home" else ("kin_home_of", "job")
                    found.append({"ask": ask, field: value})
        return found

    def impossible(self, rng: Rng) -> dict:
        """A question that nothing told so far answers."""
        while True:
            kind = rng.below(4)
            if kind == 0:
                question = {"ask": rng.choice(("home", "job", "company", "food", "color", "hobby"))}
            elif kind == 1:
                question = {"ask": "kin_name", "kin": rng.choice(KIN)}
            elif kind == 2:
                question = {"ask": "pet_name", "animal": rng.choice(ANIMALS)}
            else:
                act = rng.choice(tuple(EVENTS))
                question = {
                    "ask": f"when_{act}",
                    EVENTS[act]: rng.choice(OBJECTS if EVENTS[act] == "object" else TOWNS),
                }
            if self.answer(question)[0] == UNKNOWN:
                return question


def write_question(question: dict, log: Log) -> str:
    """The text of a question in its form `question["form"]`."""
    values = question
    if "name" in question:
        kin = next(k for k, (name, _) in log.kin.items() if name == question["name"])
        values = {**question, "kin": kin}
    elif "job" in question:
        values = {**question, "a_job": article(question["job"])}
    return QUESTIONS[question["ask"]].forms[question["form"]] % values


def read_question(text: str) -> dict:
    """The inverse of `write_question`."""
    ask, form, slots = _INDEX.read(text)
    if "name" in slots:
        slots.pop("kin", None)
    if "a_job" in slots:
        slots["job"] = slots.pop("a_job").split()[1]
    return {"ask": ask, **slots, "form": form}


def draw_form(ask: str, split: str, rng: Rng) -> int:
    """A form of the question: the last one for "eval", one of the others for "train"."""
    last = len(QUESTIONS[ask].forms) - 1
    return last if split == "eval" else rng.below(last)
