"""The user of a dialogue: draws what to say next without contradicting what was said before."""

from __future__ import annotations

from refimpl.world.base import Split
from refimpl.world.dialogue_phrases import KIN, MOOD_NAMES, WEATHERS
from refimpl.world.dialogue_questions import Log
from refimpl.world.lexicon import ANIMALS, COLORS, COMPANIES, FOODS, HOBBIES, JOBS, OBJECTS, TOWNS
from refimpl.world.names import names
from refimpl.world.rng import Rng
from refimpl.world.session_dates import FUTURE_OFFSETS, PAST_OFFSETS, shift

TOPIC_ACTS = {
    "home": ("lives", "moved", "moved"),
    "work": ("works_as", "new_job", "works_at"),
    "pets": ("has_pet", "pet_news", "pet_died"),
    "food": ("favourite_food", "ate"),
    "hobby": ("hobby",),
    "taste": ("favourite_color",),
    "shopping": ("bought", "bought", "lost"),
    "travel": ("plan_trip", "visited"),
    "family": ("kin_lives", "kin_works", "kin_moved", "kin_visit"),
    "weather": ("weather",),
}
TOPICS = tuple(TOPIC_ACTS)


class Speaker:
    """Draws what a user says next, so that it never contradicts what was said before."""

    def __init__(self, rng: Rng, split: Split) -> None:
        self.rng, self.pool = rng, names(split)
        self.user = rng.choice(self.pool)
        self.now: dict[str, str] = {}
        self.pets: dict[str, str] = {}  # animal -> name
        self.dead: set[str] = set()
        self.kin: dict[str, str] = {}
        self.changed: dict[str, str] = {}  # what -> ISO date of the last change or mention
        self.told: set[str] = set()  # what was stated in this session
        self.log = Log()

    def _taste(self, key: str, values: tuple[str, ...]) -> str:
        """A preference: it may change from session to session, never within one."""
        if key not in self.told:
            self.told.add(key)
            self.now[key] = self.rng.choice(values)
        return self.now[key]

    def _change(self, turn: dict, key: str, today: str, values: tuple[str, ...]) -> bool:
        """Put a dated change of `key` into the turn, after the last one; False when there was no time."""
        last = self.changed.get(key, "")
        days = [day for n in PAST_OFFSETS if (day := shift(today, n)) > last]
        if key in self.told or not days:
            return False
        old = value = self.now.get(key)
        while value == old:
            value = self.rng.choice(values)
        self.now[key], turn["when"] = value, self.rng.choice(days)
        return True

    def _state(self, key: str, today: str, values: tuple[str, ...]) -> str:
        """What holds for `key` today; it cannot have changed before."""
        self.told.add(key)
        self.changed[key] = today
        return self.now.setdefault(key, self.rng.choice(values))

    def _own(self, act: str, turn: dict, today: str) -> str:
        """Fill in the fields of an act about the user; returns the act, perhaps a plain statement instead."""
        rng = self.rng
        if act in ("lives", "moved"):
            act = "moved" if act == "moved" and self._change(turn, "home", today, TOWNS) else "lives"
            turn["town"] = self._state("home", today, TOWNS)
        elif act in ("works_as", "new_job"):
            act = "new_job" if act == "new_job" and self._change(turn, "job", today, JOBS) else "works_as"
            turn["job"] = self._state("job", today, JOBS)
        elif act == "works_at":
            turn["company"] = self.now.setdefault("company", rng.choice(COMPANIES))
        elif act == "favourite_food":
            turn["food"] = self._taste("food", FOODS)
        elif act == "ate":
            turn["food"] = rng.choice(FOODS)
        elif act == "hobby":
            turn["hobby"] = self._taste("hobby", HOBBIES)
        elif act == "favourite_color":
            turn["color"] = self._taste("color", COLORS)
        elif act in ("bought", "lost"):
            turn["object"], turn["when"] = rng.choice(OBJECTS), shift(today, rng.choice(PAST_OFFSETS))
            if act == "lost" and turn["mood"] == "happy":
                turn["mood"] = "sad"
        elif act == "plan_trip":
            turn["town"], turn["when"] = rng.choice(TOWNS), shift(today, rng.choice(FUTURE_OFFSETS))
        elif act == "visited":
            turn["town"], turn["when"] = rng.choice(TOWNS), shift(today, rng.choice(PAST_OFFSETS))
        elif act == "weather":
            turn["weather"] = rng.choice(WEATHERS)
        return act

    def _pet(self, act: str, turn: dict, today: str) -> str:
        """Fill in the fields of an act about a pet; nothing is told of a pet before it is introduced."""
        rng, alive = self.rng, [a for a in self.pets if a not in self.dead]
        if act == "has_pet" or not alive:
            act, animal = "has_pet", rng.choice(ANIMALS)
            while animal in self.dead:
                animal = rng.choice(ANIMALS)
            self.pets.setdefault(animal, rng.choice(self.pool))
        else:
            animal, day = rng.choice(alive), shift(today, rng.choice(PAST_OFFSETS))
            if act == "pet_died" and day > self.changed[animal]:
                turn["when"], turn["mood"] = day, "sad"
                self.dead.add(animal)
            else:
                act = "pet_news"
        self.changed[animal] = today
        if act != "pet_news":
            turn["animal"] = animal
        turn["pet"] = self.pets[animal]
        return act

    def _relative(self, act: str, turn: dict, today: str) -> str:
        """Fill in the fields of an act about a relative."""
        rng = self.rng
        kin = rng.choice(tuple(self.kin)) if self.kin and rng.random() < 0.7 else rng.choice(KIN)
        if kin not in self.kin:
            name = rng.choice(self.pool)
            while name in self.kin.values() or name == self.user:
                name = rng.choice(self.pool)
            self.kin[kin] = name
        turn["kin"], turn["name"] = kin, self.kin[kin]
        home = f"home of {kin}"
        if act == "kin_works":
            turn["job"] = self.now.setdefault(f"job of {kin}", rng.choice(JOBS))
        elif act == "kin_visit":
            turn["when"] = shift(today, rng.choice(PAST_OFFSETS))
        else:
            act = (
                "kin_moved" if act == "kin_moved" and self._change(turn, home, today, TOWNS) else "kin_lives"
            )
            turn["town"] = self._state(home, today, TOWNS)
        return act

    def turn(self, topic: str, today: str) -> dict:
        """One turn of the user on the topic."""
        rng = self.rng
        turn: dict = {"by": "user", "mood": rng.choice(MOOD_NAMES) if rng.random() < 0.4 else "neutral"}
        fill = self._pet if topic == "pets" else self._relative if topic == "family" else self._own
        turn["act"] = fill(rng.choice(TOPIC_ACTS[topic]), turn, today)
        return turn
