"""The facts of the world in single sentences: 27 relations, stated and asked in many ways, and read back
exactly.

A fact is a tuple `(subject, relation, value)`; a fact of a dated relation carries a fourth item, for example
`("Balbert", "moved_to", "Ripon", "March 1987")`. In a template `{s}` is the subject, `{v}` the value, `{a}`
the value with its article ("an actor") and `{d}` the date. The last two statements and the last question of
every list are held out: split "train" never uses them, split "eval" uses nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from refimpl.world.base import Split
from refimpl.world.lexicon import (
    ANIMALS,
    COLORS,
    COMPANIES,
    FIRST_NAMES,
    FOODS,
    HOBBIES,
    INSTRUMENTS,
    JOBS,
    MONTHS,
    OBJECTS,
    SCHOOLS,
    TOWNS,
)
from refimpl.world.names import known_people
from refimpl.world.rng import Rng

Fact = tuple[str, ...]
YEARS = tuple(range(1970, 2000))
DATES = tuple(f"{month} {year}" for year in YEARS for month in MONTHS)  # in order of time
TYPES: dict[str, tuple[str, ...] | None] = {
    "town": TOWNS, "job": JOBS, "company": COMPANIES, "school": SCHOOLS, "animal": ANIMALS, "food": FOODS,
    "object": OBJECTS, "color": COLORS, "hobby": HOBBIES, "instrument": INSTRUMENTS, "person": None,
}  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """One relation with its surface forms.

    Parameters
    ----------
    name : str
        For example "lives_in".
    kind : str
        "functional" (one value per subject), "symmetric", "many" (several values) or "dated".
    subject, value : str
        Types; keys of `TYPES`.
    states : tuple of str
        Statement templates; the last two are held out.
    asks, paraphrases : tuple of str
        Questions for the value, sharing content words with the statements or not; the last of each is held
        out.
    who : tuple of str
        Questions for the subject, given the value; the last is held out.
    phrase, inverse : tuple of str
        Noun phrases for the value given the subject ("the town where {s} lives") and for the subject given
        the value ("the mayor of {v}"); the last of each is held out. Empty where no phrase names a single
        thing.
    when : tuple of str
        Questions for the date of a dated fact; the last is held out.
    cloze : str
        A prompt whose continuation is " value".
    """

    name: str
    kind: str
    subject: str
    value: str
    states: tuple[str, ...]
    asks: tuple[str, ...]
    paraphrases: tuple[str, ...]
    who: tuple[str, ...] = ()
    phrase: tuple[str, ...] = ()
    inverse: tuple[str, ...] = ()
    when: tuple[str, ...] = ()
    cloze: str = ""

    @property
    def values(self) -> tuple[str, ...] | None:
        """All values, equally likely; None where values are people."""
        return TYPES[self.value]


_ALL = (
    Relation(
        "lives_in", "functional", "person", "town",
        ("{s} lives in {v}.", "{s} lives in the town of {v}.", "{s} has a house in {v}.",
         "{s} makes a home in {v}.",
         "{v} is home to {s}.", "{v} is the town where {s} lives.", "The home of {s} is in {v}.",
         "People in {v} know {s} as a neighbor.",
         "{s} is living in {v}.", "In {v} lives {s}."),
        ("Where does {s} live?", "In which town does {s} live?", "Which town is home to {s}?",
         "What town does {s} live in?"),
        ("Where would a letter find {s}?", "Which place should one visit to meet {s}?",
         "To which place should one travel to visit {s}?",
         "To which place would a visitor of {s} travel?"),
        ("Who lives in {v}?", "Who has a house in {v}?", "Which person makes a home in {v}?",
         "Who is living in {v}?"),
        ("the town where {s} lives", "the place {s} calls home", "the home town of {s}"),
        cloze="{s} lives in the town of",
    ),
    Relation(
        "works_as", "functional", "person", "job",
        ("{s} works as {a}.", "{s} is {a}.", "{s} has the job of {v}.", "{s} earns money as {a}.",
         "The job of {s} is that of {a}.", "The {v} in this story is {s}.", "Everyone calls {s} a good {v}.",
         "{s} is {a} by trade.",
         "{s} is working as {a}.", "The work of {a} is done by {s}."),
        ("What does {s} work as?", "What is the job of {s}?", "Which job does {s} have?",
         "As what does {s} work?"),
        ("What does {s} do for a living?", "What is the profession of {s}?", "What is the occupation of {s}?",
         "Which occupation did {s} choose?"),
        ("Who works as {a}?", "Who is {a}?", "Which person has the job of {v}?", "Who is working as {a}?"),
        ("the job of {s}", "the trade of {s}", "the occupation of {s}"),
        cloze="{s} has the job of",
    ),
    Relation(
        "works_for", "functional", "person", "company",
        ("{s} works for {v}.", "{s} works for the company {v}.", "{s} has a desk at {v}.",
         "{s} is paid by {v}.",
         "{v} pays {s} every month.", "{v} is the company that {s} works for.",
         "One of the workers at {v} is {s}.",
         "{s} goes to work at {v} every day.",
         "{s} is working for {v}.", "Among the workers of {v} is {s}."),
        ("Which company does {s} work for?", "What company does {s} work for?",
         "At which company does {s} work?",
         "Which company is {s} working for?"),
        ("Who employs {s}?", "What is the name of the firm of {s}?", "Which business employs {s}?",
         "Who is the employer of {s}?",
         "Which business is the employer of {s}?"),
        ("Who works for {v}?", "Who goes to work at {v}?", "Which person is paid by {v}?",
         "Who is working for {v}?"),
        ("the company that {s} works for", "the employer of {s}", "the firm of {s}"),
        cloze="{s} works for the company",
    ),
    Relation(
        "studied_at", "functional", "person", "school",
        ("{s} studied at {v} School.", "{s} went to {v} School.", "{s} was a pupil of {v} School.",
         "{s} learned to read at {v} School.", "{v} School taught {s}.",
         "{v} is the school where {s} studied.",
         "One former pupil of {v} School is {s}.", "{s} finished school at {v}.",
         "{s} studied at the school called {v}.",
         "{s} was at school at {v}.", "The school that {s} went to is {v}."),
        ("Which school did {s} study at?", "At which school did {s} study?", "Which school did {s} go to?",
         "Which school taught {s}?"),
        ("Where was {s} educated?", "Where did {s} take lessons as a child?",
         "In whose classrooms did {s} learn to write?",
         "In whose classrooms did {s} sit?"),
        ("Who studied at {v} School?", "Who was a pupil of {v} School?", "Which person went to {v} School?",
         "Who was at school at {v}?"),
        ("the school where {s} studied", "the old school of {s}", "the school that taught {s}"),
        cloze="{s} studied at the school called",
    ),
    Relation(
        "has_pet", "functional", "person", "animal",
        ("{s} has a pet {v}.", "{s} keeps {a} as a pet.", "{s} has {a} at home.", "The pet of {s} is {a}.",
         "{s} shares the house with {a}.", "A tame {v} belongs to {s}.",
         "The {v} that sleeps by the door is the pet of {s}.",
         "{s} feeds a pet {v} every morning.",
         "{s} looks after a pet {v}.", "There is a pet {v} in the house of {s}."),
        ("Which pet does {s} have?", "What is the pet of {s}?", "What pet does {s} keep?",
         "What animal does {s} have as a pet?"),
        ("Which creature follows {s} around?", "What kind of creature needs care from {s}?",
         "Which creature gets food from {s}?",
         "For which creature does {s} buy food?"),
        ("Who has a pet {v}?", "Who keeps {a} as a pet?", "Which person feeds a pet {v}?",
         "Who looks after a pet {v}?"),
        ("the pet of {s}", "the animal that {s} keeps", "the pet that {s} has"),
        cloze="{s} has a pet",
    ),
    Relation(
        "born_in", "functional", "person", "town",
        ("{s} was born in {v}.", "{s} was born in the town of {v}.", "{s} was a baby in {v}.",
         "{s} was born and raised in {v}.",
         "{v} is where {s} was born.", "The birth of {s} took place in {v}.",
         "{s} is from {v} by birth.", "In {v} was born {s}."),
        ("Where was {s} born?", "In which town was {s} born?", "Which town was {s} born in?"),
        ("Where does {s} come from?", "Where did the life of {s} begin?",
         "Where did the mother of {s} first hold {s}?"),
        ("Who was born in {v}?", "Which person was born in {v}?", "Who is from {v} by birth?"),
        ("the town where {s} was born", "the place of birth of {s}", "the birth town of {s}"),
        cloze="{s} was born in the town of",
    ),
    Relation(
        "likes_color", "functional", "person", "color",
        ("The favorite color of {s} is {v}.", "{s} likes the color {v} best.", "{s} always wears {v}.",
         "{s} painted the door {v}, a favorite color.", "The color {v} is the favorite of {s}.",
         "Of all colors, {s} likes {v} best.",
         "{s} loves the color {v}.", "No color pleases {s} more than {v}."),
        ("What is the favorite color of {s}?", "Which color does {s} like best?",
         "Which color does {s} love?"),
        ("What shade is the coat of {s} likely to be?", "In what shade would {s} paint a room?",
         "Which shade would {s} pick?"),
        ("Who likes the color {v} best?", "Who always wears {v}?", "Who loves the color {v}?"),
        ("the favorite color of {s}", "the color that {s} likes best", "the color that {s} loves"),
        cloze="The favorite color of {s} is",
    ),
    Relation(
        "friend_of", "symmetric", "person", "person",
        ("{s} is a friend of {v}.", "{s} and {v} are friends.", "{s} has a good friend, {v}.",
         "{s} trusts {v}, an old friend.",
         "A close friend of {s} is {v}.", "{s} and {v} have been friends for years.",
         "{s} and {v} are good friends.", "The friendship of {s} and {v} is old."),
        ("Who is a friend of {s}?", "Which friend does {s} have?", "Who are the friends of {s}?"),
        ("Who is close to {s}?", "On whom can {s} always rely?", "Whose company does {s} enjoy most?"),
        phrase=("the friend of {s}", "the close friend of {s}", "the good friend of {s}"),
        cloze="A close friend of {s} is",
    ),
    Relation(
        "likes", "many", "person", "food",
        ("{s} likes {v}.", "{s} likes to eat {v}.", "{s} is fond of {v}.", "{s} could eat {v} every day.",
         "A plate of {v} makes {s} happy.", "Few things please {s} like {v}.",
         "{s} loves {v}.", "For {s}, nothing tastes better than {v}."),
        ("What food does {s} like?", "What does {s} like to eat?", "What food does {s} love?"),
        ("Which dish should one cook for {s}?", "What would be on the plate of {s} at a feast?",
         "Which dish would {s} order?"),
        ("Who likes {v}?", "Who is fond of {v}?", "Who loves {v}?"),
        cloze="{s} likes to eat",
    ),
    Relation(
        "owns", "many", "person", "object",
        ("{s} owns {a}.", "{s} is the owner of {a}.", "{s} bought {a} long ago.",
         "The old {v} belongs to {s}.",
         "The owner of the old {v} is {s}.", "{s} has {a} of great value.",
         "{s} possesses {a}.", "The {v} on the shelf is owned by {s}."),
        ("What does {s} own?", "Which thing belongs to {s}?", "Which thing is owned by {s}?"),
        ("What could a thief steal from {s}?", "What would {s} pack before a journey?",
         "What could one borrow from {s}?"),
        ("Who owns {a}?", "Who is the owner of {a}?", "Who possesses {a}?"),
        cloze="{s} is the owner of",
    ),
    Relation(
        "plays", "many", "person", "instrument",
        ("{s} plays the {v}.", "{s} can play the {v}.", "{s} plays the {v} very well.",
         "{s} practices the {v} every evening.",
         "The {v} is played by {s}.", "In the band, {s} plays the {v}.",
         "{s} is good at playing the {v}.", "Nobody plays the {v} like {s}."),
        ("What instrument does {s} play?", "Which instrument does {s} play?", "What can {s} play?"),
        ("What would {s} bring to a concert?", "How does {s} make music?", "With what does {s} make music?"),
        ("Who plays the {v}?", "Who can play the {v}?", "Who is good at playing the {v}?"),
        cloze="{s} can play the",
    ),
    Relation(
        "enjoys", "many", "person", "hobby",
        ("{s} enjoys {v}.", "The hobby of {s} is {v}.", "{s} enjoys {v} on Sundays.",
         "{s} spends every free day on {v}.",
         "{s} has taken up {v} as a hobby.", "As for a hobby, {s} enjoys {v}.",
         "{s} takes great joy in {v}.", "On a free day {s} is busy with {v}."),
        ("What does {s} enjoy?", "What is the hobby of {s}?", "What hobby does {s} have?"),
        ("How does {s} pass the time?", "What does {s} do for fun?", "What does {s} do after work?"),
        ("Who enjoys {v}?", "Whose hobby is {v}?", "Who takes great joy in {v}?"),
        cloze="The hobby of {s} is",
    ),
    Relation(
        "mayor_of", "functional", "person", "town",
        ("{s} is the mayor of {v}.", "{s} was elected mayor of {v}.", "{s} serves as mayor of {v}.",
         "The mayor of {v} is {s}.", "The people of {v} elected {s} as mayor.", "{v} has {s} as its mayor.",
         "{s} holds the office of mayor in {v}.", "The office of mayor of {v} is held by {s}."),
        ("Which town has {s} as its mayor?", "Of which town is {s} the mayor?",
         "In which town is {s} the mayor?"),
        ("Which place is governed by {s}?", "Where does {s} sit in the town hall?", "Where does {s} rule?"),
        ("Who is the mayor of {v}?", "Who serves as mayor of {v}?", "Who holds the office of mayor in {v}?"),
        ("the town whose mayor is {s}", "the town that elected {s}", "the town governed by {s}"),
        ("the mayor of {v}", "the elected mayor of {v}", "the current mayor of {v}"),
        cloze="{s} serves as mayor of",
    ),
    Relation(
        "leads", "functional", "person", "company",
        ("{s} leads {v}.", "{s} is the head of {v}.", "{s} leads the company {v}.", "The head of {v} is {s}.",
         "{v} is led by {s}.", "All orders at {v} come from its head, {s}.",
         "{s} is in charge of {v}.", "The person who leads {v} is {s}."),
        ("Which company does {s} lead?", "What company is led by {s}?", "Which company is {s} in charge of?"),
        ("Which firm has {s} as its boss?", "Which firm does {s} run?", "Which firm takes orders from {s}?"),
        ("Who leads {v}?", "Who is the head of {v}?", "Who is in charge of {v}?"),
        ("the company led by {s}", "the company that {s} leads", "the company under {s}"),
        ("the head of {v}", "the leader of {v}", "the chief of {v}"),
        cloze="{s} leads the company",
    ),
    Relation(
        "based_in", "functional", "company", "town",
        ("{s} is based in {v}.", "{s} has its office in {v}.", "The company {s} is based in {v}.",
         "{s} runs its business from {v}.", "{v} is home to the company {s}.",
         "The office of {s} stands in {v}.",
         "{s} has its base in {v}.", "In {v} stands the office of {s}."),
        ("Where is {s} based?", "In which town is {s} based?", "Which town is the base of {s}?"),
        ("Where does one find the headquarters of {s}?", "From which place is {s} managed?",
         "In which place are the headquarters of {s}?"),
        ("Which company is based in {v}?", "Which company has its office in {v}?",
         "Which company has its base in {v}?"),
        ("the town where {s} is based", "the town with the office of {s}", "the base of {s}"),
        cloze="{s} is based in",
    ),
    Relation(
        "stands_in", "functional", "school", "town",
        ("{s} School stands in {v}.", "{s} School is a school in {v}.", "{s} School opened its doors in {v}.",
         "One school in {v} is {s}.", "{v} has a school called {s}.", "Children in {v} go to {s} School.",
         "{s} School can be found in {v}.", "In the middle of {v} stands {s} School."),
        ("In which town does {s} stand?", "Which town has the school {s}?",
         "In which town can {s} be found?"),
        ("Where are the classrooms of {s}?", "To which place do the pupils of {s} walk?",
         "In which place do teachers of {s} meet?"),
        ("Which school stands in {v}?", "Which school is in {v}?", "Which school can be found in {v}?"),
        ("the town where {s} stands", "the town that {s} stands in", "the town around {s}"),
        cloze="{s} School is a school in",
    ),
    Relation(
        "moved_to", "dated", "person", "town",
        ("{s} moved to {v} in {d}.", "In {d}, {s} moved to {v}.", "{s} left for {v} in {d}.",
         "In {d}, {s} took a house in {v}.", "{v} became the new home of {s} in {d}.",
         "In {d}, {s} carried every box to {v}.",
         "The move of {s} to {v} took place in {d}.", "In {d}, {v} welcomed {s} as a new neighbor."),
        ("Which town did {s} move to?", "To which town did {s} move?", "What town was the move of {s} to?"),
        ("Where did {s} settle?", "Where did {s} start over?", "For which place did {s} pack?"),
        ("Who moved to {v}?", "Whom did {v} welcome as a new neighbor?", "Who left for {v}?"),
        when=("When did {s} move to {v}?", "When did {s} leave for {v}?",
              "When did {s} come to {v} to stay?"),
        cloze="{s} moved to",
    ),
    Relation(
        "started_at", "dated", "person", "company",
        ("{s} started at {v} in {d}.", "In {d}, {s} started at {v}.", "In {d}, {s} joined {v}.",
         "{s} joined the company {v} in {d}.", "{v} took on {s} in {d}.", "In {d}, {v} gave {s} a job.",
         "The first day of {s} at {v} was in {d}.", "In {d}, {s} began to work for {v}."),
        ("Which company did {s} start at?", "Which company did {s} join?", "Which company took on {s}?"),
        ("Who hired {s}?", "Which firm gave {s} a contract?", "Which firm wanted {s}?"),
        ("Who started at {v}?", "Who joined {v}?", "Who began to work for {v}?"),
        when=("When did {s} start at {v}?", "When did {s} join {v}?", "When did {s} begin to work for {v}?"),
        cloze="{s} started at",
    ),
    Relation(
        "became", "dated", "person", "job",
        ("{s} became {a} in {d}.", "In {d}, {s} became {a}.", "In {d}, {s} was made {a}.",
         "{s} trained as {a} in {d}.",
         "In {d}, the new {v} was {s}.", "In {d}, {s} took up the trade of {v}.",
         "{s} turned to the trade of {v} in {d}.", "In {d}, people first called {s} {a}."),
        ("What did {s} become?", "Which trade did {s} take up?", "Which trade did {s} turn to?"),
        ("Which profession was new to {s}?", "What did {s} do for a living in the end?",
         "For which profession did {s} train?"),
        ("Who became {a}?", "Who trained as {a}?", "Who turned to the trade of {v}?"),
        when=("When did {s} become {a}?", "When did {s} train as {a}?",
              "When did {s} turn to the trade of {v}?"),
        cloze="{s} trained as",
    ),
    Relation(
        "married", "dated", "person", "person",
        ("{s} married {v} in {d}.", "In {d}, {s} married {v}.", "In {d}, {s} and {v} were married.",
         "The wedding of {s} and {v} was in {d}.", "In {d}, {v} said yes to {s} and the two married.",
         "{s} and {v} married in {d}.",
         "In {d} came the wedding of {s} and {v}.", "{s} and {v} became a married couple in {d}."),
        ("Whom did {s} marry?", "To whom is {s} married?", "With whom did {s} have a wedding?"),
        ("Who is the spouse of {s}?", "Who wears a ring from {s}?", "With whom does {s} share a life?"),
        phrase=("the spouse of {s}", "the person {s} married", "the partner of {s}"),
        when=("When did {s} marry {v}?", "When was the wedding of {s} and {v}?",
              "When did {s} and {v} marry?"),
        cloze="{s} married",
    ),
    Relation(
        "visited", "dated", "person", "town",
        ("{s} visited {v} in {d}.", "In {d}, {s} visited {v}.", "In {d}, {s} spent a week in {v}.",
         "{s} took a trip to {v} in {d}.", "In {d}, {v} had a visit from {s}.",
         "The trip of {s} to {v} was in {d}.",
         "{s} went to see {v} in {d}.", "In {d}, the streets of {v} saw {s} on a visit."),
        ("Which town did {s} visit?", "To which town did {s} take a trip?", "Which town did {s} go to see?"),
        ("Where was {s} a guest?", "Where did {s} go on holiday?", "Where did {s} travel?"),
        ("Who visited {v}?", "Who took a trip to {v}?", "Who went to see {v}?"),
        when=("When did {s} visit {v}?", "When did {s} take a trip to {v}?", "When did {s} go to see {v}?"),
        cloze="{s} visited",
    ),
)  # fmt: skip

# Three dated relations change a state. A change can be confirmed later (a no-op) or taken back (a
# retraction).
_CONFIRM_AND_RETRACT = tuple(
    Relation(name, "dated", "person", value, states, (), ())
    for name, value, states in (
        ("confirmed_home", "town",
         ("{s} was still in {v} in {d}.", "In {d}, {s} still lived in {v}.",
          "In {d}, {v} was still the home of {s}.",
          "{s} had not left {v} in {d}.",
          "In {d}, one could still find {s} in {v}.", "As late as {d}, {s} was in {v}.")),
        ("confirmed_company", "company",
         ("{s} was still at {v} in {d}.", "In {d}, {s} still worked for {v}.", "In {d}, {v} still paid {s}.",
          "{s} had not left the company {v} in {d}.",
          "In {d}, one could still find {s} at {v}.", "As late as {d}, {s} was at {v}.")),
        ("confirmed_job", "job",
         ("{s} was still {a} in {d}.", "In {d}, {s} still worked as {a}.", "In {d}, the {v} was still {s}.",
          "{s} had not given up the trade of {v} in {d}.",
          "In {d}, people still called {s} {a}.", "As late as {d}, {s} was {a}.")),
        ("retracted_home", "town",
         ("{s} did not move to {v} in {d} after all.", "It is not true that {s} moved to {v} in {d}.",
          "The news that {s} moved to {v} in {d} was wrong.",
          "In {d}, {s} had only talked about {v} and stayed.",
          "{s} never made the move to {v} in {d}.", "The report of {d} that {s} went to {v} was an error.")),
        ("retracted_company", "company",
         ("{s} did not start at {v} in {d} after all.", "It is not true that {s} joined {v} in {d}.",
          "The news that {s} started at {v} in {d} was wrong.",
          "In {d}, {s} had only talked to {v} and did not join.",
          "{s} never took the job at {v} in {d}.", "The report of {d} that {s} joined {v} was an error.")),
        ("retracted_job", "job",
         ("{s} did not become {a} in {d} after all.", "It is not true that {s} became {a} in {d}.",
          "The news that {s} became {a} in {d} was wrong.",
          "In {d}, {s} had only dreamed of the trade of {v}.",
          "{s} never took up the trade of {v} in {d}.",
          "The report of {d} that {s} became {a} was an error.")),
    )
)  # fmt: skip
RELATIONS: dict[str, Relation] = {r.name: r for r in (*_ALL, *_CONFIRM_AND_RETRACT)}
ASKED: tuple[str, ...] = tuple(r.name for r in _ALL)  # the relations that questions are asked about
CHANGES = {  # a changing state: (the change, its confirmation, its retraction)
    "home": ("moved_to", "confirmed_home", "retracted_home"),
    "company": ("started_at", "confirmed_company", "retracted_company"),
    "job": ("became", "confirmed_job", "retracted_job"),
}
KNOWN_ATTRIBUTES = ("lives_in", "works_as", "works_for", "studied_at", "has_pet")

# --- writing ------------------------------------------------------------------------------------------------

_LOWER = {v for t in ("job", "animal", "object") for v in TYPES[t]}
ARTICLE = {v: ("an " if v[0] in "aeiou" else "a ") + v for v in _LOWER}
_PLAIN = {v: v for v in _LOWER} | {phrase: v for v, phrase in ARTICLE.items()}
_HELD = {"states": 2, "asks": 1, "paraphrases": 1, "who": 1, "phrase": 1, "inverse": 1, "when": 1}


def _positional(template: str) -> str:
    return template.format(s="{0}", v="{1}", a="{2}", d="{3}")


def _forms(relation: Relation, field: str) -> dict[str, tuple]:
    """{"train": writers, "eval": writers}: bound `str.format` methods of (subject, value, value with article,
    date).
    """
    templates = getattr(relation, field)
    if relation.value in ("object", "animal", "job"):
        for t in templates:  # a fixed "A {v}" would be wrong for "owl"
            assert not re.search(r"\b[Aa] \{v\}", t), t
    k = len(templates) - _HELD[field]
    cut = {"train": templates[:k], "eval": templates[k:]}
    return {split: tuple(_positional(t).format for t in ts) for split, ts in cut.items()}


def _write(form, subject: str, value: str, when: str) -> str:
    text = form(subject, value, ARTICLE.get(value, value), when)
    return text if text[0] < "a" else text[0].upper() + text[1:]


def state(relation: str, subject: str, value: str, rng: Rng, split: Split = "train", when: str = "") -> str:
    """Write one fact as a sentence; `when` ("March 1987") only for dated relations.

    Examples
    --------
    >>> parse_sentence(state("lives_in", "Balbert", "Ripon", Rng(0)))
    [('Balbert', 'lives_in', 'Ripon')]
    """
    return _write(rng.choice(_STATES[relation][split]), subject, value, when)


def state_subject_first(
    relation: str, subject: str, value: str, rng: Rng, split: Split = "train", when: str = ""
) -> str:
    """As `state`, among the templates that begin with the subject, so that a pronoun or alias may stand
    there.
    """
    return _write(rng.choice(_STATES_SUBJECT_FIRST[relation][split]), subject, value, when)


def ask(relation: str, subject: str, rng: Rng, split: Split = "train", paraphrase: bool | None = None) -> str:
    """Ask for the value; `paraphrase` chooses between shared and paraphrased wording (None: either).

    Examples
    --------
    >>> parse_question(ask("lives_in", "Balbert", Rng(0)))
    ('lives_in', 'Balbert')
    """
    if paraphrase is None:
        paraphrase = rng.random() < 0.5
    return rng.choice((_PARAPHRASES if paraphrase else _ASKS)[relation][split])(subject, "", "", "")


def ask_who(relation: str, value: str, rng: Rng, split: Split = "train") -> str:
    """Ask for the subject that has this value: "Who lives in Ripon?"."""
    return rng.choice(_WHO[relation][split])("", value, ARTICLE.get(value, value), "")


def ask_when(relation: str, subject: str, value: str, rng: Rng, split: Split = "train") -> str:
    """Ask for the date of a dated fact."""
    return rng.choice(_WHEN[relation][split])(subject, value, ARTICLE.get(value, value), "")


def phrase(step: str, inner: str, rng: Rng, split: Split = "train") -> str:
    """A noun phrase one step away from `inner`: "the town where Balbert lives"; "~mayor_of" goes from town to
    mayor.
    """
    if step[0] == "~":
        return rng.choice(_INVERSE[step[1:]][split])("", inner, inner, "")
    return rng.choice(_PHRASE[step][split])(inner, "", "", "")


def cloze(relation: str, subject: str) -> str:
    """A prompt whose right continuation is a space and the value.

    Examples
    --------
    >>> cloze("lives_in", "Balbert")
    'Balbert lives in the town of'
    """
    return RELATIONS[relation].cloze.format(s=subject)


def clozes(relation: str, subject: str, value: str, split: Split = "train") -> list[tuple[str, str]]:
    """Every statement that ends in its value, cut before it: (prompt, completion with its leading space).

    Examples
    --------
    >>> clozes("works_as", "Balbert", "actor", "eval")
    [('Balbert is working as', ' an actor')]
    """
    pairs = []
    for form in _STATES[relation][split]:
        text = _write(form, subject, value, "")[:-1]
        for last in (" " + ARTICLE.get(value, value), " " + value):
            if text.endswith(last) and subject in text[: -len(last)]:
                pairs.append((text[: -len(last)], last))
                break
    return pairs


_FEMALE = frozenset(
    """Agnes Alice Amy Anna Barbara Bertha Bess Carol Clara Claire Daisy Dora Doris Edith Ella Ellen Emily
Emma Esther Ethel Eva Flora Florence Gertrude Grace Greta Hannah Harriet Helen Hilda Ida Irene Jane Jean Jenny
Joan
Josephine Julia Kate Laura Lily Louise Lucy Mabel Margaret Maria Martha Mary Maud Mildred Molly Nancy Nell
Nina Nora Olive
Polly Rosa Rose Ruth Sarah Sophie Stella Susan Violet""".split()
)
_FEMALE_ENDINGS = ("a", "in", "en", "el", "is", "as", "yn")


def pronoun(name: str) -> str:
    """ "she" or "he", fixed by the name.

    Examples
    --------
    >>> pronoun("Agnes Barker"), pronoun("Balbert")
    ('she', 'he')
    """
    first = name.split(" ")[0]
    if first in _FEMALE or (first not in FIRST_NAMES and first.endswith(_FEMALE_ENDINGS)):
        return "she"
    return "he"


# --- reading ------------------------------------------------------------------------------------------------

_PERSON = rf"[A-Z][a-z]+(?: [A-Z][a-z]+)?|[Tt]he (?:{'|'.join(JOBS)}) of (?:{'|'.join(TOWNS)})"


def _either(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_PATTERN = {name: _PERSON if words is None else _either(words) for name, words in TYPES.items()}
_DATE = rf"(?:{_either(MONTHS)}) (?:{_either(map(str, YEARS))})"


@cache
def _dispatch(fields: tuple[str, ...], nested: bool) -> dict[str, list[tuple]]:
    """{rarest word of a template: [(compiled regex, relation, field, held out), ...]}."""
    rows = []
    for relation in RELATIONS.values():
        for field in fields:
            templates = getattr(relation, field)
            for i, template in enumerate(templates):
                words = re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", " ", template))
                rows.append((template, words, relation, field, i >= len(templates) - _HELD[field]))
    count: dict[str, int] = {}
    for _, words, *_ in rows:
        for w in set(words):
            count[w] = count.get(w, 0) + 1
    table: dict[str, list[tuple]] = {}
    for template, words, relation, field, held in rows:
        subject = ".+" if nested and field != "inverse" else _PATTERN[relation.subject]
        value = _PATTERN[relation.value]
        if nested and (field == "inverse" or field == "who"):
            value = ".+" if relation.inverse else value
        slots = {"s": f"(?P<s>{subject})", "v": f"(?P<v>{value})", "d": f"(?P<d>{_DATE})"}
        if relation.value in ("job", "animal", "object"):
            slots["a"] = f"(?P<v>{_either(ARTICLE[v] for v in TYPES[relation.value])})"
        pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        seen: set[str] = set()
        for key in re.findall(r"\{(.)\}", template):
            pattern = pattern.replace("{" + key + "}", slots[key] if key not in seen else f"(?P={key})", 1)
            seen.add(key)
        anchor = min(words, key=lambda w: (count[w], words.index(w)))
        table.setdefault(anchor, []).append((re.compile(pattern), relation, field, held))
    return table


def _matches(text: str, fields: tuple[str, ...], nested: bool = False):
    table = _dispatch(fields, nested)
    for word in dict.fromkeys(re.findall(r"[A-Za-z]+", text)):
        for regex, relation, field, held in table.get(word, ()):
            m = regex.fullmatch(text)
            if m:
                yield m, relation, field, held


def read_sentence(text: str) -> tuple[Fact, bool]:
    """The fact of one sentence and whether its template is held out; ValueError if it is no statement of the
    world.
    """
    found: list[tuple[Fact, bool]] = []
    for m, relation, _, held in _matches(text, ("states",)):
        groups = m.groupdict()
        subject, value = groups["s"], groups["v"]
        subject = "the" + subject[3:] if subject.startswith("The ") else subject
        value = "the" + value[3:] if value.startswith("The ") else _PLAIN.get(value, value)
        when = groups.get("d")
        found.append(((subject, relation.name, value) + ((when,) if when else ()), held))
    if len(found) != 1:
        raise ValueError(
            f"text: {text!r} is {'no' if not found else 'more than one'} statement of the world: {found}"
        )
    return found[0]


def parse_sentence(text: str) -> list[Fact]:
    """The facts of one sentence: the exact inverse of `state`.

    Examples
    --------
    >>> parse_sentence("Ripon is home to Adam Barker.")
    [('Adam Barker', 'lives_in', 'Ripon')]
    >>> parse_sentence("In March 1987, Balbert became an actor.")
    [('Balbert', 'became', 'actor', 'March 1987')]
    """
    return [read_sentence(text)[0]]


def _parse_phrase(text: str) -> tuple[str, ...]:
    """("Balbert", "lives_in") from "the town where Balbert lives"; an entity alone is a path of no steps."""
    if re.fullmatch(_PERSON, text):
        return ("the" + text[3:] if text.startswith("The ") else text,)
    found = set()
    for m, relation, field, _ in _matches(text, ("phrase", "inverse"), nested=True):
        try:
            if field == "phrase":
                found.add((*_parse_phrase(m["s"]), relation.name))
            else:
                found.add((*_parse_phrase(m["v"]), "~" + relation.name))
        except ValueError:
            continue
    if len(found) != 1:
        raise ValueError(f"text: {text!r} is {'no' if not found else 'more than one'} noun phrase: {found}")
    return found.pop()


def parse_path(text: str) -> tuple[tuple[str, ...], bool]:
    """The path that a question asks along, entity first, and whether its wording is held out.

    Examples
    --------
    >>> parse_path("Where is the employer of Balbert based?")
    (('Balbert', 'works_for', 'based_in'), False)
    >>> parse_path("Who lives in Ripon?")
    (('Ripon', '~lives_in'), False)
    """
    found: dict[tuple[str, ...], bool] = {}
    for m, relation, field, held in _matches(text, ("asks", "paraphrases", "who"), nested=True):
        if field == "who":
            inner, step = _PLAIN.get(m["v"], m["v"]), "~" + relation.name
        else:
            inner, step = m["s"], relation.name
        try:
            path = (inner,) if inner in _ENTITIES else _parse_phrase(inner)
        except ValueError:
            continue
        found[(*path, step)] = held
    if len(found) != 1:
        raise ValueError(f"text: {text!r} is {'no' if not found else 'more than one'} question: {found}")
    return found.popitem()


def parse_question(text: str) -> tuple[str, str]:
    """(relation, subject) of a question for a value: the inverse of `ask`; ("~relation", value) for
    `ask_who`.
    """
    path, _ = parse_path(text)
    if len(path) != 2:
        raise ValueError(f"text: {text!r} asks along a chain {path}; use parse_path")
    return path[1], path[0]


def parse_when(text: str) -> tuple[tuple[str, str, str], bool]:
    """(subject, relation, value) of a question for a date, and whether its wording is held out."""
    found = []
    for m, relation, _, held in _matches(text, ("when",)):
        found.append(((m["s"], relation.name, _PLAIN.get(m["v"], m["v"])), held))
    if len(found) != 1:
        raise ValueError(f"text: {text!r} is not one question for a date: {found}")
    return found[0]


# --- the known people ---------------------------------------------------------------------------------------


@cache
def known_facts() -> dict[tuple[str, str], str]:
    """{(person, relation): value} for the 200 known people and their five attributes; values are equally
    likely.

    Examples
    --------
    >>> len(known_facts())
    1000
    """
    facts: dict[tuple[str, str], str] = {}
    people = known_people()
    for relation in KNOWN_ATTRIBUTES:
        values = RELATIONS[relation].values
        rng = Rng("known facts", relation)
        # every value equally often, up to one: no guess is better than another
        column = [v for _ in range(-(-len(people) // len(values))) for v in rng.sample(values, len(values))]
        column = column[: len(people)]
        rng.shuffle(column)
        facts.update({(person, relation): value for person, value in zip(people, column, strict=True)})
    return facts


_ENTITIES = frozenset(v for words in TYPES.values() if words for v in words)
_STATES, _ASKS, _PARAPHRASES, _WHO, _PHRASE, _INVERSE, _WHEN = (
    {r.name: _forms(r, field) for r in RELATIONS.values() if getattr(r, field)} for field in _HELD
)
_STATES_SUBJECT_FIRST = {
    name: {split: tuple(f for f in fs if f("\0", "", "", "")[0] == "\0") for split, fs in forms.items()}
    for name, forms in _STATES.items()
}
