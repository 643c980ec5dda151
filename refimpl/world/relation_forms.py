"""How the world words its relations: a table of statements, questions and noun phrases, and nothing else.

In a template `{s}` is the subject, `{v}` the value, `{a}` the value with its article ("an actor") and `{d}`
the date. The last two statements of every relation, and the last of its direct questions, paraphrases, noun
phrases and questions for a date, are held out. A held-out wording says in another construction what training
says with the same or other words, so that a model which reads, and does not match strings, has what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.world.lexicon import (
    ANIMALS,
    COLORS,
    COMPANIES,
    FOODS,
    HOBBIES,
    INSTRUMENTS,
    JOBS,
    OBJECTS,
    SCHOOLS,
    TOWNS,
)

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
        Statement templates; the last two are held out. From those that begin with the subject come the
        questions for the subject ("Who lives in {v}?").
    asks, paraphrases : tuple of str
        Questions for the value, sharing content words with the statements or not; the last of each is held
        out.
    phrase, inverse : tuple of str
        Noun phrases for the value given the subject ("the town where {s} lives") and for the subject given
        the value ("the mayor of {v}"); the last of each is held out. Questions are framed around them ("Can
        you name the town where {s} lives?").
    who : tuple of str
        Further questions for the subject; the last is held out.
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
    asks: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    phrase: tuple[str, ...] = ()
    inverse: tuple[str, ...] = ()
    who: tuple[str, ...] = ()
    when: tuple[str, ...] = ()
    cloze: str = ""

    @property
    def values(self) -> tuple[str, ...] | None:
        """All values, equally likely; None where values are people."""
        return TYPES[self.value]


def _forms(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().split("\n"))


def _relation(name: str, kind: str, subject: str, value: str, cloze: str, **forms: str) -> Relation:
    return Relation(name, kind, subject, value, cloze=cloze, **{k: _forms(t) for k, t in forms.items()})


ASKED_RELATIONS = (
    _relation(
        "lives_in", "functional", "person", "town", "{s} lives in the town of",
        states="""
            {s} lives in {v}.
            {s} lives in the town of {v}.
            {s} has a house in {v}.
            {s} makes a home in {v}.
            {v} is home to {s}.
            {v} is the town where {s} lives.
            The home of {s} is in {v}.
            People in {v} know {s} as a neighbor.
            {s} rents a room in {v}.
            {s} has lived in {v} for years.
            In {v} you will find the home of {s}.
            The house of {s} stands in {v}.
            One of those living in {v} is {s}.
            {s} is at home in the town of {v}.
            {s} is living in {v}.
            In {v} lives {s}.""",
        asks="""
            Where does {s} live?
            In which town does {s} live?
            Which town is home to {s}?
            Where is the home of {s}?
            Where does {s} have a house?
            In what town does {s} make a home?
            Where is {s} living?
            What town does {s} live in?""",
        paraphrases="""
            Where would a letter find {s}?
            Which place should one visit to meet {s}?
            To which place should one travel to visit {s}?
            Where should a letter to {s} be sent?
            Which place does {s} return to at night?
            Where does {s} wake up each day?
            To which place would a visitor of {s} travel?
            In which place would a visitor look for {s}?""",
        phrase="""
            the town where {s} lives
            the place {s} calls home
            the home of {s}
            the town that {s} lives in
            the place where {s} has a house
            the home town of {s}""",
    ),
    _relation(
        "works_as", "functional", "person", "job", "{s} has the job of",
        states="""
            {s} works as {a}.
            {s} is {a}.
            {s} has the job of {v}.
            {s} earns money as {a}.
            The job of {s} is that of {a}.
            The {v} in this story is {s}.
            Everyone calls {s} a good {v}.
            {s} is {a} by trade.
            {s} puts bread on the table as {a}.
            {s} has worked for years as {a}.
            By trade, {s} is {a}.
            If you need {a}, ask {s}.
            The trade of {s} is that of {a}.
            {s} does the work of {a}.
            {s} is working as {a}.
            The work of {a} is done by {s}.""",
        asks="""
            What does {s} work as?
            What is the job of {s}?
            Which job does {s} have?
            What job does {s} do?
            What kind of work does {s} do?
            As what is {s} working?
            What is {s} by trade?
            As what does {s} work?""",
        paraphrases="""
            What does {s} do for a living?
            What is the profession of {s}?
            What is the occupation of {s}?
            Which profession does {s} have?
            Which occupation does {s} have?
            What profession did {s} pick?
            In which profession is {s}?
            Which occupation did {s} choose?""",
        phrase="""
            the job of {s}
            the trade of {s}
            the job that {s} has
            the work of {s}
            the job {s} does
            the work that {s} does""",
    ),
    _relation(
        "works_for", "functional", "person", "company", "{s} works for the company",
        states="""
            {s} works for {v}.
            {s} works for the company {v}.
            {s} has a desk at {v}.
            {s} is paid by {v}.
            {v} pays {s} every month.
            {v} is the company that {s} works for.
            One of the workers at {v} is {s}.
            {s} goes to work at {v} every day.
            {s} works at {v}.
            {s} has worked for {v} for years.
            At {v}, {s} has a desk by the window.
            The wages of {s} come from {v}.
            {s} belongs to the staff of {v}.
            The workers of {v} know {s} as one of them.
            {s} is working for {v}.
            Among the workers of {v} is {s}.""",
        asks="""
            Which company does {s} work for?
            What company does {s} work for?
            At which company does {s} work?
            For which company does {s} work?
            Which company pays {s}?
            At what company does {s} have a desk?
            What company is {s} working for?
            Which company is {s} working for?""",
        paraphrases="""
            Who employs {s}?
            What is the name of the firm of {s}?
            Which business employs {s}?
            Who is the employer of {s}?
            Which firm is the employer of {s}?
            Which business has {s} as an employee?
            By which firm is {s} employed?
            Which business is the employer of {s}?""",
        phrase="""
            the company that {s} works for
            the employer of {s}
            the company of {s}
            the company where {s} works
            the company that pays {s}
            the firm of {s}""",
    ),
    _relation(
        "studied_at", "functional", "person", "school", "{s} studied at the school called",
        states="""
            {s} studied at {v} School.
            {s} went to {v} School.
            {s} was a pupil of {v} School.
            {s} learned to read at {v} School.
            {v} School taught {s}.
            {v} is the school where {s} studied.
            One former pupil of {v} School is {s}.
            {s} finished school at {v}.
            {s} studied at the school called {v}.
            {s} spent the school years at {v}.
            The old school of {s} is {v}.
            At {v} School, {s} sat in the front row.
            {s} passed every test at {v} School.
            The school of {s} was {v}.
            {s} was at school at {v}.
            The school that {s} went to is {v}.""",
        asks="""
            Which school did {s} study at?
            At which school did {s} study?
            Which school did {s} go to?
            What school did {s} go to?
            Where did {s} go to school?
            Of which school was {s} a pupil?
            What school taught {s}?
            Which school taught {s}?""",
        paraphrases="""
            Where was {s} educated?
            Where did {s} take lessons as a child?
            In whose classrooms did {s} learn to write?
            Whose classrooms did {s} sit in?
            In whose classrooms was {s} educated?
            Where did {s} get an education?
            In which classrooms did {s} sit?
            In whose classrooms did {s} sit?""",
        phrase="""
            the school where {s} studied
            the old school of {s}
            the school {s} went to
            the school of {s}
            the school where {s} was a pupil
            the school that taught {s}""",
    ),
    _relation(
        "has_pet", "functional", "person", "animal", "{s} has a pet",
        states="""
            {s} has a pet {v}.
            {s} keeps {a} as a pet.
            {s} has {a} at home.
            The pet of {s} is {a}.
            {s} shares the house with {a}.
            A tame {v} belongs to {s}.
            The {v} that sleeps by the door is the pet of {s}.
            {s} feeds a pet {v} every morning.
            {s} takes a pet {v} for walks.
            At home, {s} keeps {a}.
            {s} plays with a pet {v} after supper.
            The animal that {s} keeps is {a}.
            Every evening {s} brushes a pet {v}.
            There is {a} in the house of {s}.
            {s} looks after a pet {v}.
            There is a pet {v} in the house of {s}.""",
        asks="""
            Which pet does {s} have?
            What is the pet of {s}?
            What pet does {s} keep?
            What animal does {s} keep?
            Which animal does {s} have at home?
            What kind of pet does {s} have?
            Which animal is the pet of {s}?
            What animal does {s} have as a pet?""",
        paraphrases="""
            Which creature follows {s} around?
            What kind of creature needs care from {s}?
            Which creature gets food from {s}?
            Which creature waits for {s}?
            For which creature does {s} care?
            What kind of creature depends on {s}?
            For what creature does {s} buy food?
            For which creature does {s} buy food?""",
        phrase="""
            the pet of {s}
            the animal that {s} keeps
            the animal of {s}
            the pet {s} keeps
            the kind of pet that {s} has
            the pet that {s} has""",
    ),
    _relation(
        "born_in", "functional", "person", "town", "{s} was born in the town of",
        states="""
            {s} was born in {v}.
            {s} was born in the town of {v}.
            {s} was a baby in {v}.
            {s} was born and raised in {v}.
            {v} is where {s} was born.
            The birth of {s} took place in {v}.
            {s} took a first breath in {v}.
            {v} is the place of birth of {s}.
            In {v}, a baby called {s} was born.
            The place where {s} was born is {v}.
            {s} entered the world in {v}.
            {s} was born to a family of {v}.
            By birth, {s} is a child of {v}.
            {s} is from {v} by birth.
            In {v} was born {s}.""",
        asks="""
            Where was {s} born?
            In which town was {s} born?
            What town was {s} born in?
            Where did the birth of {s} take place?
            Which town saw the birth of {s}?
            In what town was {s} born?
            Where was {s} a baby?
            Which town was {s} born in?""",
        paraphrases="""
            Where does {s} come from?
            Where did the life of {s} begin?
            In which place did the life of {s} start?
            From which place does {s} come?
            Where did the mother of {s} first smile at {s}?
            Where did the mother of {s} first sing to {s}?
            Where did {s} first cry?
            Where did the mother of {s} first hold {s}?""",
        phrase="""
            the town where {s} was born
            the place of birth of {s}
            the birth town of {s}
            the place where {s} was born
            the town in which {s} was a baby
            the town in which {s} was born""",
    ),
    _relation(
        "likes_color", "functional", "person", "color", "The favorite color of {s} is",
        states="""
            The favorite color of {s} is {v}.
            {s} likes the color {v} best.
            {s} always wears {v}.
            {s} painted the door {v}, a favorite color.
            The color {v} is the favorite of {s}.
            Of all colors, {s} likes {v} best.
            {s} thinks that {v} is the best color.
            {s} only buys {v} coats.
            Nothing looks better to {s} than the color {v}.
            {s} likes {v} more than any other color.
            The color that {s} likes most is {v}.
            The color {v} pleases {s}.
            No color is better than {v}, {s} thinks.
            {s} loves to wear {v}.
            {s} loves the color {v}.
            No color pleases {s} more than {v}.""",
        asks="""
            What is the favorite color of {s}?
            Which color does {s} like best?
            What color does {s} like best?
            Which color is the favorite of {s}?
            What color does {s} wear?
            Which color pleases {s} most?
            What color does {s} love?
            Which color does {s} love?""",
        paraphrases="""
            What shade is the coat of {s} likely to be?
            In what shade would {s} paint a room?
            Which shade does {s} look for in a shop?
            Which shade would {s} choose?
            What shade would make {s} smile?
            In which shade does {s} dress?
            What shade would {s} pick?
            Which shade would {s} pick?""",
        phrase="""
            the favorite color of {s}
            the color that {s} likes best
            the best color for {s}
            the color {s} wears
            the color that {s} likes
            the color that {s} loves""",
    ),
    _relation(
        "friend_of", "symmetric", "person", "person", "A close friend of {s} is",
        states="""
            {s} is a friend of {v}.
            {s} and {v} are friends.
            {s} has a good friend, {v}.
            {s} trusts {v}, an old friend.
            A close friend of {s} is {v}.
            {s} and {v} have been friends for years.
            {s} is friends with {v}.
            {s} calls {v} a friend.
            {s} has a friend called {v}.
            The best friend of {s} is {v}.
            Friends like {s} and {v} are rare.
            {s} tells every secret to {v}, a friend.
            The friendship between {s} and {v} goes deep.
            The friendship of {s} with {v} will last.
            {s} and {v} are good friends.
            The friendship of {s} and {v} is old.""",
        asks="""
            Who is a friend of {s}?
            Which friend does {s} have?
            Who is the best friend of {s}?
            Whom does {s} call a friend?
            With whom is {s} friends?
            Who are those that {s} calls friends?
            Who is friends with {s}?
            Who are the friends of {s}?""",
        paraphrases="""
            Who is close to {s}?
            On whom can {s} always rely?
            Whom does {s} tell everything?
            Who would help {s} at any time?
            Whose company does {s} like to keep?
            Whose company does {s} enjoy?
            Who knows {s} well?
            Whose company does {s} enjoy most?""",
        phrase="""
            the friend of {s}
            the close friend of {s}
            the best friend of {s}
            the old friend of {s}
            the one friend of {s}
            the good friend of {s}""",
    ),
    _relation(
        "likes", "many", "person", "food", "{s} likes to eat",
        states="""
            {s} likes {v}.
            {s} likes to eat {v}.
            {s} is fond of {v}.
            {s} could eat {v} every day.
            A plate of {v} makes {s} happy.
            Few things please {s} like {v}.
            {s} never says no to {v}.
            The favorite food of {s} is {v}.
            {s} eats {v} with joy.
            {s} is happy with a bowl of {v}.
            What {s} likes to eat is {v}.
            Nothing tastes as good to {s} as {v}.
            For {s}, a meal without {v} is no meal.
            {s} loves to eat {v}.
            {s} loves {v}.
            For {s}, nothing tastes better than {v}.""",
        asks="""
            What food does {s} like?
            What does {s} like to eat?
            Which food does {s} like?
            Of which food is {s} fond?
            What could {s} eat every day?
            Which food makes {s} happy?
            Which food does {s} love?
            What food does {s} love?""",
        paraphrases="""
            Which dish should one cook for {s}?
            What would be on the plate of {s} at a feast?
            Which dish would {s} want for supper?
            Which dish would {s} choose?
            What should a cook serve {s}?
            What would {s} order at an inn?
            Which dish is right for {s}?
            Which dish would {s} order?""",
        phrase="""
            the food that {s} likes
            the favorite food of {s}
            the food {s} is fond of
            the food that makes {s} happy
            the food that {s} likes to eat
            the food that {s} loves""",
    ),
    _relation(
        "owns", "many", "person", "object", "{s} is the owner of",
        states="""
            {s} owns {a}.
            {s} is the owner of {a}.
            {s} bought {a} long ago.
            The old {v} belongs to {s}.
            The owner of the old {v} is {s}.
            {s} has {a} of great value.
            {s} keeps {a} under the bed.
            The {v} in the hall is the property of {s}.
            {s} got {a} as a gift.
            Among the things of {s} is {a}.
            {s} would never sell the old {v}.
            The {v} by the stove is owned by {s}.
            {s} is in possession of {a}.
            {s} possesses {a}.
            The {v} on the shelf is owned by {s}.""",
        asks="""
            What does {s} own?
            Which thing belongs to {s}?
            Of what is {s} the owner?
            Which thing does {s} own?
            What belongs to {s}?
            What thing does {s} have?
            What thing is owned by {s}?
            Which thing is owned by {s}?""",
        paraphrases="""
            What could a thief steal from {s}?
            What would {s} pack before a journey?
            What would a neighbor borrow from {s}?
            What would {s} carry out of a fire?
            What could {s} lend to a neighbor?
            What could {s} lose on a journey?
            What would one borrow from {s}?
            What could one borrow from {s}?""",
        phrase="""
            the thing that {s} owns
            the thing that belongs to {s}
            the property of {s}
            the thing {s} has
            the thing in the hands of {s}
            the thing owned by {s}""",
        who="""
            Whose is the old {v}?
            To whom does the old {v} belong?
            Whose property is the {v}?
            Whose property is the old {v}?""",
    ),
    _relation(
        "plays", "many", "person", "instrument", "{s} can play the",
        states="""
            {s} plays the {v}.
            {s} can play the {v}.
            {s} plays the {v} very well.
            {s} practices the {v} every evening.
            The {v} is played by {s}.
            In the band, {s} plays the {v}.
            {s} learned to play the {v}.
            {s} takes lessons on the {v}.
            {s} performs on the {v}.
            The instrument of {s} is the {v}.
            {s} has played the {v} for years.
            When {s} plays the {v}, people listen.
            Nobody is better at the {v} than {s}.
            {s} likes playing the {v}.
            {s} is good at playing the {v}.
            Nobody plays the {v} like {s}.""",
        asks="""
            What instrument does {s} play?
            Which instrument does {s} play?
            What is the instrument of {s}?
            What does {s} practice?
            Which instrument can {s} play?
            What does {s} play in the band?
            On which instrument does {s} perform?
            What can {s} play?""",
        paraphrases="""
            What would {s} bring to a concert?
            How does {s} make music?
            What would {s} tune before a concert?
            What does {s} use to make music?
            What does {s} need to make music?
            What would {s} need for a concert?
            By what means does {s} make music?
            With what does {s} make music?""",
        phrase="""
            the instrument of {s}
            the instrument that {s} plays
            the instrument {s} practices
            the instrument on which {s} performs
            the instrument {s} learned
            the instrument that {s} can play""",
    ),
    _relation(
        "enjoys", "many", "person", "hobby", "The hobby of {s} is",
        states="""
            {s} enjoys {v}.
            The hobby of {s} is {v}.
            {s} enjoys {v} on Sundays.
            {s} spends every free day on {v}.
            {s} has taken up {v} as a hobby.
            As for a hobby, {s} enjoys {v}.
            {s} is never tired of {v}.
            {s} finds joy in {v}.
            On Sundays {s} is busy with {v}.
            {s} has {v} as a hobby.
            On a free day, {s} enjoys {v}.
            {s} joined a club for {v}.
            Nothing is as pleasant to {s} as {v}.
            A free day for {s} means {v}.
            {s} takes great joy in {v}.
            On a free day {s} is busy with {v}.""",
        asks="""
            What does {s} enjoy?
            What is the hobby of {s}?
            Which hobby does {s} have?
            What does {s} enjoy on Sundays?
            On what does {s} spend free days?
            In what does {s} find joy?
            Which hobby has {s} taken up?
            What hobby does {s} have?""",
        paraphrases="""
            How does {s} pass the time?
            What does {s} do for fun?
            What does {s} do to relax?
            How does {s} relax?
            What does {s} do when work is over?
            How does {s} have fun after work?
            What does {s} do after work?
            How does {s} spend time after work?""",
        phrase="""
            the hobby of {s}
            the hobby that {s} has
            the thing that {s} enjoys
            the hobby {s} enjoys
            the hobby {s} has taken up
            the hobby that {s} enjoys""",
        who="""
            Whose hobby is {v}?
            Whose joy is {v}?
            For whom is {v} a joy?
            For whom is {v} a hobby?""",
    ),
    _relation(
        "mayor_of", "functional", "person", "town", "{s} serves as mayor of",
        states="""
            {s} is the mayor of {v}.
            {s} was elected mayor of {v}.
            {s} serves as mayor of {v}.
            The mayor of {v} is {s}.
            The people of {v} elected {s} as mayor.
            {v} has {s} as its mayor.
            {s} became mayor of {v} by one vote.
            {v} chose {s} as mayor.
            As mayor of {v}, {s} works hard.
            {s} has been mayor of {v} for years.
            {s} won the office of mayor in {v}.
            The town of {v} has a mayor called {s}.
            The office of mayor in {v} went to {s}.
            {s} holds the office of mayor in {v}.
            The office of mayor of {v} is held by {s}.""",
        asks="""
            Which town has {s} as its mayor?
            Of which town is {s} the mayor?
            Which town elected {s} as mayor?
            What town is {s} the mayor of?
            Where is {s} the mayor?
            Which town chose {s} as mayor?
            In what town is {s} the mayor?
            In which town is {s} the mayor?""",
        paraphrases="""
            Which place is governed by {s}?
            Where does {s} sit in the town hall?
            Which place does {s} rule?
            Where does {s} govern?
            Which place is ruled by {s}?
            In which place does {s} rule?
            Where does {s} rule?""",
        phrase="""
            the town whose mayor is {s}
            the town that elected {s}
            the town of which {s} is mayor
            the town that has {s} as mayor
            the town ruled by {s}
            the town governed by {s}""",
        inverse="""
            the mayor of {v}
            the elected mayor of {v}
            the mayor who governs {v}
            the present mayor of {v}
            the current mayor of {v}""",
    ),
    _relation(
        "leads", "functional", "person", "company", "{s} leads the company",
        states="""
            {s} leads {v}.
            {s} is the head of {v}.
            {s} leads the company {v}.
            The head of {v} is {s}.
            {v} is led by {s}.
            All orders at {v} come from its head, {s}.
            {s} is the leader of {v}.
            {s} directs the company {v}.
            The leader of {v} is called {s}.
            At {v}, {s} makes every decision.
            {s} took charge of {v}.
            {s} sits at the head of {v}.
            The person in charge at {v} is {s}.
            {s} is in charge of {v}.
            The person who leads {v} is {s}.""",
        asks="""
            Which company does {s} lead?
            What company is led by {s}?
            Of which company is {s} the head?
            Which company has {s} as its head?
            What company does {s} direct?
            Which company is led by {s}?
            Of what company is {s} in charge?
            Which company is {s} in charge of?""",
        paraphrases="""
            Which firm has {s} as its boss?
            Which firm does {s} run?
            Which firm is run by {s}?
            At which firm is {s} the boss?
            Which firm must obey {s}?
            At which firm does {s} give orders?
            Which firm takes orders from {s}?""",
        phrase="""
            the company led by {s}
            the company that {s} leads
            the company that {s} directs
            the company whose head is {s}
            the company under the lead of {s}
            the company under {s}""",
        inverse="""
            the head of {v}
            the leader of {v}
            the boss of {v}
            the person in charge of {v}
            the chief of {v}""",
    ),
    _relation(
        "based_in", "functional", "company", "town", "{s} is based in",
        states="""
            {s} is based in {v}.
            {s} has its office in {v}.
            The company {s} is based in {v}.
            {s} runs its business from {v}.
            {v} is home to the company {s}.
            The office of {s} stands in {v}.
            {s} opened its office in {v}.
            The workers of {s} meet in {v}.
            One company in {v} is {s}.
            The base of {s} is in {v}.
            {s} sends its letters from {v}.
            In {v} one finds the office of {s}.
            {s} has its base in {v}.
            In {v} stands the office of {s}.""",
        asks="""
            Where is {s} based?
            In which town is {s} based?
            Where is the office of {s}?
            In which town is the office of {s}?
            Which town is home to the company {s}?
            Where does {s} have its office?
            Where is the base of {s}?
            Which town is the base of {s}?""",
        paraphrases="""
            Where does one find the headquarters of {s}?
            From which place is {s} managed?
            Where are the headquarters of {s}?
            From which place is {s} run?
            In which place is {s} managed?
            In what place are the headquarters of {s}?
            In which place are the headquarters of {s}?""",
        phrase="""
            the town where {s} is based
            the town with the office of {s}
            the town of the company {s}
            the town that is home to {s}
            the town with the base of {s}
            the base of {s}""",
    ),
    _relation(
        "stands_in", "functional", "school", "town", "{s} School is a school in",
        states="""
            {s} School stands in {v}.
            {s} School is a school in {v}.
            {s} School opened its doors in {v}.
            One school in {v} is {s}.
            {v} has a school called {s}.
            Children in {v} go to {s} School.
            {s} School was built in {v}.
            The town of {v} is proud of {s} School.
            The children of {v} are taught at {s}.
            In {v} there is a school called {s}.
            The bell of {s} School rings in {v}.
            You can find {s} School in {v}.
            {s} School can be found in {v}.
            In the middle of {v} stands {s} School.""",
        asks="""
            In which town does {s} stand?
            Which town has the school {s}?
            Where does {s} stand?
            In what town does {s} stand?
            In which town would one find {s}?
            Where can {s} be found?
            In which town can {s} be found?""",
        paraphrases="""
            Where are the classrooms of {s}?
            To which place do the pupils of {s} walk?
            In which place do the pupils of {s} learn?
            Where do the teachers of {s} work?
            In which place do the teachers of {s} work?
            To which place do teachers of {s} walk?
            In which place do teachers of {s} meet?""",
        phrase="""
            the town where {s} stands
            the town that {s} stands in
            the town that has {s}
            the town with the school {s}
            the town in which {s} stands
            the town around {s}""",
    ),
    _relation(
        "moved_to", "dated", "person", "town", "{s} moved to",
        states="""
            {s} moved to {v} in {d}.
            In {d}, {s} moved to {v}.
            {s} left for {v} in {d}.
            In {d}, {s} took a house in {v}.
            {v} became the new home of {s} in {d}.
            In {d}, {s} carried every box to {v}.
            The move of {s} to {v} took place in {d}.
            {s} came to {v} to stay in {d}.
            In {d}, {s} became a new neighbor in {v}.
            {s} set up a new home in {v} in {d}.
            Since {d}, {s} has been at home in {v}.
            In {d}, the people of {v} welcomed {s} to a new home.
            {s} made the move to {v} in {d}.
            In {d}, {v} welcomed {s} as a new neighbor.""",
        asks="""
            Which town did {s} move to?
            To which town did {s} move?
            Where did {s} move?
            What town did {s} move to?
            Which town is the new home of {s}?
            Which town did {s} leave for?
            To what town was the move of {s}?
            What town was the move of {s} to?""",
        paraphrases="""
            Where did {s} settle?
            Where did {s} start over?
            For which place did {s} pack the bags?
            In which place did {s} settle down?
            For which place did {s} say goodbye?
            For what place did {s} pack?
            For which place did {s} pack?""",
        phrase="""
            the new home of {s}
            the town {s} moved to
            the town that {s} left for
            the town that {s} moved to
            the town to which {s} moved""",
        when="""
            When did {s} move to {v}?
            When did {s} leave for {v}?
            When did {s} take a house in {v}?
            When was the move of {s} to {v}?
            When did {s} come to {v}?
            When did {s} come to {v} to stay?""",
    ),
    _relation(
        "started_at", "dated", "person", "company", "{s} started at",
        states="""
            {s} started at {v} in {d}.
            In {d}, {s} started at {v}.
            In {d}, {s} joined {v}.
            {s} joined the company {v} in {d}.
            {v} took on {s} in {d}.
            In {d}, {v} gave {s} a job.
            The first day of {s} at {v} was in {d}.
            {s} took a job at {v} in {d}.
            In {d}, {s} was taken on by {v}.
            Since {d}, {s} has been with {v}.
            {s} began a career at {v} in {d}.
            The new worker at {v} in {d} was {s}.
            {s} began at {v} in {d}.
            In {d}, {s} began to work for {v}.""",
        asks="""
            Which company did {s} start at?
            Which company did {s} join?
            What company did {s} join?
            At which company did {s} start?
            Which company gave {s} a job?
            At which company did {s} take a job?
            What company took on {s}?
            Which company took on {s}?""",
        paraphrases="""
            Who hired {s}?
            Which firm gave {s} a contract?
            Which firm hired {s}?
            By whom was {s} hired?
            From which firm did {s} get a contract?
            What firm wanted {s}?
            Which firm wanted {s}?""",
        phrase="""
            the company that {s} joined
            the company {s} started at
            the company that took on {s}
            the new company of {s}
            the company where {s} began
            the company where {s} started""",
        when="""
            When did {s} start at {v}?
            When did {s} join {v}?
            When did {v} take on {s}?
            When did {s} take a job at {v}?
            When did {s} begin at {v}?
            When did {s} begin to work for {v}?""",
    ),
    _relation(
        "became", "dated", "person", "job", "{s} trained as",
        states="""
            {s} became {a} in {d}.
            In {d}, {s} became {a}.
            In {d}, {s} was made {a}.
            {s} trained as {a} in {d}.
            In {d}, the new {v} was {s}.
            In {d}, {s} took up the trade of {v}.
            {s} learned the trade of {v} in {d}.
            In {d}, {s} began a new life as {a}.
            Since {d}, {s} has been {a}.
            {s} started out as {a} in {d}.
            In {d}, {s} turned from other work to that of {a}.
            From {d} on, people called {s} {a}.
            {s} turned to the trade of {v} in {d}.
            In {d}, people first called {s} {a}.""",
        asks="""
            What did {s} become?
            Which trade did {s} take up?
            What trade did {s} learn?
            As what did {s} train?
            Which trade did {s} learn?
            What was {s} made?
            To which trade did {s} turn?
            Which trade did {s} turn to?""",
        paraphrases="""
            Which profession was new to {s}?
            What did {s} do for a living in the end?
            Which profession did {s} enter?
            Which profession did {s} prepare for?
            For which profession did {s} prepare?
            Into which profession did {s} go?
            For which profession did {s} train?""",
        phrase="""
            the new trade of {s}
            the trade that {s} took up
            the trade that {s} learned
            the trade {s} trained for
            the trade {s} turned to""",
        when="""
            When did {s} become {a}?
            When did {s} train as {a}?
            When did {s} learn the trade of {v}?
            When did {s} take up the trade of {v}?
            When did {s} turn to the trade of {v}?""",
    ),
    _relation(
        "married", "dated", "person", "person", "{s} married",
        states="""
            {s} married {v} in {d}.
            In {d}, {s} married {v}.
            In {d}, {s} and {v} were married.
            The wedding of {s} and {v} was in {d}.
            In {d}, {v} said yes to {s} and the two married.
            {s} and {v} married in {d}.
            {s} got married to {v} in {d}.
            In {d}, guests came to the wedding of {s} and {v}.
            {s} and {v} exchanged rings in {d}.
            {s} has been married to {v} since {d}.
            The marriage of {s} and {v} dates from {d}.
            {s} and {v} became a couple in {d}.
            In {d} came the wedding of {s} and {v}.
            {s} and {v} became a married couple in {d}.""",
        asks="""
            Whom did {s} marry?
            To whom is {s} married?
            Who got married to {s}?
            Who is married to {s}?
            With whom did {s} exchange rings?
            With whom did {s} celebrate a wedding?
            With whom did {s} have a wedding?""",
        paraphrases="""
            Who is the spouse of {s}?
            Who wears a ring from {s}?
            Who is the wife or husband of {s}?
            Who shares a life with {s}?
            With whom did {s} stand before the priest?
            With whom does {s} share the days of life?
            With whom does {s} share a life?""",
        phrase="""
            the spouse of {s}
            the person {s} married
            the person married to {s}
            the wife or husband of {s}
            the partner of {s}""",
        when="""
            When did {s} marry {v}?
            When was the wedding of {s} and {v}?
            When were {s} and {v} married?
            When did {s} get married to {v}?
            When did {s} and {v} marry?""",
    ),
    _relation(
        "visited", "dated", "person", "town", "{s} visited",
        states="""
            {s} visited {v} in {d}.
            In {d}, {s} visited {v}.
            In {d}, {s} spent a week in {v}.
            {s} took a trip to {v} in {d}.
            In {d}, {v} had a visit from {s}.
            The trip of {s} to {v} was in {d}.
            {s} made a trip to {v} in {d}.
            In {d}, {s} saw the sights of {v}.
            {s} went on a visit to {v} in {d}.
            In {d}, {s} walked through the streets of {v} on a trip.
            The visit of {s} to {v} was in {d}.
            {s} spent a week in {v} in {d}.
            {s} went to see {v} in {d}.
            In {d}, the streets of {v} saw {s} on a visit.""",
        asks="""
            Which town did {s} visit?
            To which town did {s} take a trip?
            What town did {s} visit?
            Which town had a visit from {s}?
            Where did {s} take a trip?
            Which town did {s} see on a trip?
            In which town did {s} spend a week?
            Which town did {s} go to see?""",
        paraphrases="""
            Where was {s} a guest?
            Where did {s} go on holiday?
            To which place did {s} travel?
            Which place did {s} tour?
            Where did {s} travel on holiday?
            Where did {s} travel?
            In which place was {s} a guest?""",
        phrase="""
            the town {s} visited
            the town that had a visit from {s}
            the town {s} took a trip to
            the town that {s} visited
            the town that {s} went to see""",
        when="""
            When did {s} visit {v}?
            When did {s} take a trip to {v}?
            When was the trip of {s} to {v}?
            When did {s} spend a week in {v}?
            When did {s} go to see {v}?""",
    ),
)  # fmt: skip

# Three dated relations change a state. A change can be confirmed later (a no-op) or taken back (a
# retraction).
CONFIRMED_OR_RETRACTED = (
    _relation(
        "confirmed_home", "dated", "person", "town", "",
        states="""
            {s} was still in {v} in {d}.
            In {d}, {s} still lived in {v}.
            In {d}, {v} was still the home of {s}.
            {s} had not left {v} in {d}.
            In {d}, one could still find {s} in {v}.
            As late as {d}, {s} was in {v}.""",
    ),
    _relation(
        "confirmed_company", "dated", "person", "company", "",
        states="""
            {s} was still at {v} in {d}.
            In {d}, {s} still worked for {v}.
            In {d}, {v} still paid {s}.
            {s} had not left the company {v} in {d}.
            In {d}, one could still find {s} at {v}.
            As late as {d}, {s} was at {v}.""",
    ),
    _relation(
        "confirmed_job", "dated", "person", "job", "",
        states="""
            {s} was still {a} in {d}.
            In {d}, {s} still worked as {a}.
            In {d}, the {v} was still {s}.
            {s} had not given up the trade of {v} in {d}.
            In {d}, people still called {s} {a}.
            As late as {d}, {s} was {a}.""",
    ),
    _relation(
        "retracted_home", "dated", "person", "town", "",
        states="""
            {s} did not move to {v} in {d} after all.
            It is not true that {s} moved to {v} in {d}.
            The news that {s} moved to {v} in {d} was wrong.
            In {d}, {s} had only talked about {v} and stayed.
            {s} never made the move to {v} in {d}.
            The report of {d} that {s} went to {v} was an error.""",
    ),
    _relation(
        "retracted_company", "dated", "person", "company", "",
        states="""
            {s} did not start at {v} in {d} after all.
            It is not true that {s} joined {v} in {d}.
            The news that {s} started at {v} in {d} was wrong.
            In {d}, {s} had only talked to {v} and did not join.
            {s} never took the job at {v} in {d}.
            The report of {d} that {s} joined {v} was an error.""",
    ),
    _relation(
        "retracted_job", "dated", "person", "job", "",
        states="""
            {s} did not become {a} in {d} after all.
            It is not true that {s} became {a} in {d}.
            The news that {s} became {a} in {d} was wrong.
            In {d}, {s} had only dreamed of the trade of {v}.
            {s} never took up the trade of {v} in {d}.
            The report of {d} that {s} became {a} was an error.""",
    ),
)  # fmt: skip

# Questions around a noun phrase {n} and around a predicate {p}; the last frame of each row is held out.
VALUE_FRAMES = _forms("""
    What is {n}?
    Name {n}.
    Which is {n}?
    Tell me {n}.
    Do you know {n}?
    Can you name {n}?""")
PERSON_FRAMES = _forms("""
    Who is {n}?
    Name {n}.
    Tell me the name of {n}.
    Do you know {n}?
    Can you name {n}?""")
WHO_FRAMES = {
    "person": _forms("""
        Who {p}?
        Which person {p}?
        Name the person who {p}.
        Do you know who {p}?
        Of all these, who {p}?
        Can you say who {p}?"""),
    "company": _forms("""
        Which company {p}?
        What company {p}?
        Name the company that {p}.
        Do you know which company {p}?
        Can you say which company {p}?"""),
    "school": _forms("""
        Which school {p}?
        What school {p}?
        Name the school that {p}.
        Do you know which school {p}?
        Can you say which school {p}?"""),
}
