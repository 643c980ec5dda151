"""One-line summaries of sessions, and questions with a pronoun beside their full form."""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.world.dialogue_phrases import PRONOUN
from refimpl.world.dialogue_sessions import turns_of
from refimpl.world.phrasebook import article
from refimpl.world.session_dates import long_date

CLAUSES = {
    "lives": "lives in {town}",
    "moved": "moved to {town} on {when}",
    "works_as": "works as {job}",
    "new_job": "became {job} on {when}",
    "works_at": "works for {company}",
    "has_pet": "has {animal} called {pet}",
    "pet_died": "lost the {animal} {pet} on {when}",
    "favourite_food": "likes {food} best",
    "hobby": "enjoys {hobby}",
    "favourite_color": "prefers {color}",
    "bought": "bought {object} on {when}",
    "lost": "lost {object} on {when}",
    "plan_trip": "will travel to {town} on {when}",
    "visited": "was in {town} on {when}",
    "kin_lives": "has {kin} {name} who lives in {town}",
    "kin_works": "has {kin} {name} who works as {job}",
    "kin_moved": "has {kin} {name} who moved to {town} on {when}",
    "kin_visit": "saw the {kin} {name} on {when}",
}
_ARTICLES = {
    "works_as": ("job",),
    "new_job": ("job",),
    "kin_works": ("job", "kin"),
    "kin_lives": ("kin",),
    "kin_moved": ("kin",),
    "has_pet": ("animal",),
    "bought": ("object",),
    "lost": ("object",),
}


def clause(turn: dict) -> str:
    """What a turn adds to a summary."""
    values = dict(turn)
    for field in _ARTICLES.get(turn["act"], ()):
        values[field] = article(turn[field])
    if "when" in turn:
        values["when"] = long_date(turn["when"])
    return CLAUSES[turn["act"]].format_map(values)


def summary(dialogue: dict) -> str:
    """The summary line: each statement once, in the order told, with resolved dates."""
    told = [clause(t) for _, _, t in turns_of(dialogue) if t["act"] in CLAUSES]
    if not told:
        return "nothing new."
    return f"{dialogue['user']} " + "; ".join(dict.fromkeys(told)) + "."


@dataclass(frozen=True)
class Rewrite:
    """A question with a pronoun; `{she}` and `{her}` become the relative in full."""

    template: str

    def both(self, kin: str, name: str) -> tuple[str, str]:
        """(with the pronoun, in full)."""
        she = PRONOUN[kin]
        short = {"she": she, "her": "her" if she == "she" else "his", "him": "her" if she == "she" else "him"}
        full = f"my {kin} {name}"
        return self.template.format_map(short), self.template.format_map(
            {"she": full, "him": full, "her": full + "'s"}
        )


REWRITE = tuple(
    map(
        Rewrite,
        (
            "Where does {she} live?",
            "What does {she} work as?",
            "Do you know where {she} lives?",
            "When did I meet {him}?",
            "What did I tell you about {him}?",
            "In which town is {her} home?",
            "What is {her} job?",
            "Is {she} well?",
            "When did {she} come to see me?",
            "Should I write to {him}?",
            "How far is it to {her} house?",
            "Would {she} like a letter from me?",
        ),
    )
)
