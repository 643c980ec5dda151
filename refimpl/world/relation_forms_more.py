"""More wordings of the same relations, in which no model was pretrained: tables, and nothing else.

`relation_forms.py` holds the wording of pretraining and, apart from it, the held-out wording. This table is a
third one, "more": a model that is trained on it as well has met each fact in other words than it will be
tested in. A template `A (b|c) d` stands for two, `A b d` and `A c d`. No template is, or is nearly, a
held-out one: `tests/world/test_more_wordings.py` measures the distance.
"""

from __future__ import annotations


def _forms(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().split("\n"))


def _more(**fields: str) -> dict[str, tuple[str, ...]]:
    return {field: _forms(text) for field, text in fields.items()}


# relation -> field of `Relation` -> templates
MORE: dict[str, dict[str, tuple[str, ...]]] = {
    "lives_in": _more(
        states="""
            {s} resides in the (old|new) part of {v}.
            {s} dwells in a street of {v}.
            {s} (has|keeps) (an apartment|a flat|a cottage) in {v}.
            {s} is a (resident|citizen) of {v}.
            {s} (inhabits|occupies) a (small|large|quiet) house in {v}.
            {s} has put down roots in {v}.
            {s} (sleeps|eats breakfast) under a roof in {v}.
            It is in {v} that {s} (resides|has a bed|spends the nights).
            {v} counts {s} among its (residents|inhabitants|people).
            The address of {s} is (a street|a lane|an alley) in {v}.
            {s}'s (house|apartment|address) is in {v}.
            There is a house in {v} where {s} (sleeps|stays).
            After work, {s} (walks|rides|goes) home to {v}.
            Among the (residents|inhabitants) of {v} is {s}.
            The (front door|kitchen|garden) of {s} is in {v}.
            To reach the door of {s}, one must go to {v}.""",
        asks="""
            In (which|what) town does {s} (reside|dwell)?
            Where does {s} (reside|dwell)?
            Of (which|what) town is {s} a (resident|citizen)?
            (Which|What) town counts {s} among its (people|residents)?
            Where is {s}'s (house|apartment|address)?
            In (which|what) town would one find the (house|door|bed) of {s}?
            (Which|What) town is the address of {s} in?""",
        paraphrases="""
            Where does {s} (sleep|go to bed|eat breakfast)?
            To (which|what) place does {s} go home (after work|in the evening)?
            Where would you knock on the door of {s}?
            Where would the mail of {s} be delivered?
            (Which|What) place is written on letters to {s}?""",
        phrase="""
            the town where {s} (resides|dwells)
            the place of residence of {s}
            the town on the address of {s}
            the town with the house of {s}
            the place where {s} goes to bed""",
    ),
    "works_as": _more(
        states="""
            {s} (makes|earns) a living as {a}.
            {s} has found employment as {a}.
            {s} is a (trained|skilled|licensed) {v}.
            {s} practices the (profession|craft) of {v}.
            Neighbors (know|respect|value) {s} as {a}.
            {s} pays the bills as {a}.
            {s} spends the working day as {a}.
            The (profession|occupation|calling) of {s} is that of {a}.
            {s}'s (job|profession|occupation) is that of {a}.
            In daily life, {s} is {a}.
            It is {s} who works as {a} in these parts.
            On the door sign of {s} stands the word {v}.
            There is {a} (called|named) {s}.
            One can hire {s} as {a}.
            With the skills of {a}, {s} earns a wage.
            The (hands|tools) of {s} are those of {a}.""",
        asks="""
            What (job|kind of job) does {s} hold?
            In what line of work is {s}?
            What is {s}'s (job|trade)?
            (Which|What) work does {s} do (every day|all week)?
            What sort of worker is {s}?
            What is {s} employed as?
            By what (trade|job) does {s} live?""",
        paraphrases="""
            How does {s} (earn a living|make a living|make money|earn a wage)?
            What is {s} in working life?
            What would {s} write under profession in a form?
            What is the calling of {s}?
            (Which|What) (career|calling|craft) does {s} (follow|pursue)?
            With what skill does {s} earn (money|bread)?""",
        phrase="""
            the (profession|occupation|calling|craft) of {s}
            the trade by which {s} lives
            the job by which {s} makes a living
            the line of work of {s}""",
    ),
    "works_for": _more(
        states="""
            {s} is (on the payroll of|an employee of) {v}.
            {s} (draws|earns|gets) a salary from {v}.
            {s} has (an office|a locker|a chair) at the company {v}.
            {s} spends (working hours|every weekday) at {v}.
            {s} wears the (badge|uniform) of {v} at work.
            {s} (serves|labors for) the company {v}.
            {v} employs {s}.
            {v} has hired {s} as a worker.
            {v} has {s} on its (staff|payroll).
            The employer of {s} is {v}.
            {s}'s (salary|pay|paycheck) comes from {v}.
            It is {v} that (employs|pays) {s}.
            Every morning, {s} reports for duty at {v}.
            There is an employee called {s} at {v}.
            On the payroll of {v} stands the name of {s}.
            The (paychecks|orders) of {s} come from the company {v}.""",
        asks="""
            (Which|What) company employs {s}?
            By (which|what) company is {s} (employed|paid)?
            (Which|What) company has {s} on its (payroll|staff)?
            From (which|what) company does {s} get (a salary|wages|pay)?
            What is the name of the company that {s} serves?
            Who pays the (salary|wages) of {s}?
            Whom does {s} work for all week?""",
        paraphrases="""
            Who signs the paychecks of {s}?
            Who gives {s} work?
            At (which|what) (firm|business) does {s} (earn money|have a job)?
            Where is {s} employed?
            On whose payroll is {s}?
            (Which|What) (firm|business) pays for the labor of {s}?""",
        phrase="""
            the company that employs {s}
            the company on whose payroll {s} is
            the business that pays {s}
            the company which {s} serves
            the company that gives {s} a salary""",
    ),
    "studied_at": _more(
        states="""
            {s} attended {v} School.
            {s} is a graduate of {v} School.
            {s} graduated from {v} School.
            {s} (got|received) an education at {v} School.
            {s} has a diploma from {v} School.
            {s} did lessons in the classrooms of {v} School.
            {s} wore the (uniform|cap) of {v} School as a child.
            {s} enrolled at {v} School as a child.
            {v} School counts {s} among its (graduates|former pupils).
            {v} School gave {s} (an education|a diploma|good marks).
            The teachers of {v} School (remember|trained) {s}.
            As a child, {s} walked to {v} School every morning.
            It was at {v} School that {s} (learned to write|learned to count|was educated).
            {s}'s school days were spent at {v}.
            The diploma of {s} is from {v} School.
            There was a pupil called {s} at {v} School.""",
        asks="""
            (Which|What) school did {s} attend as a child?
            From (which|what) school did {s} graduate?
            (Which|What) school gave {s} (an education|a diploma)?
            At (which|what) school was {s} (educated|a student)?
            What was the name of {s}'s school?
            In (which|what) school did {s} (learn to read|do lessons|take tests)?
            Of (which|what) school is {s} a graduate?""",
        paraphrases="""
            Where did {s} (learn to count|graduate|get a diploma)?
            Whose teachers (trained|educated) {s}?
            Whose uniform did {s} wear as a child?
            Where was {s} a student?
            Who gave {s} a diploma?
            Who educated {s}?
            Where did {s} enroll as a child?""",
        phrase="""
            the school {s} attended as a child
            the school from which {s} graduated
            the school that gave {s} a diploma
            the school of which {s} is a graduate
            the school on the diploma of {s}""",
    ),
    "has_pet": _more(
        states="""
            {s} is the (owner|keeper) of a (tame|pet) {v}.
            {s} pampers a (tame|pet) {v} (at home|all day long).
            {s} lives together with {a}.
            {s} has (adopted|tamed|raised) {a}.
            {s} gives (water|treats) to a pet {v} twice a day.
            {s} would not part with a pet {v}.
            At the feet of {s} (sleeps|naps|lies) {a}.
            In the house of {s} (lives|dwells) a tame {v}.
            {s}'s pet is {a}.
            The animal companion of {s} is {a}.
            A tame {v} (follows|trusts|obeys) {s}.
            It is {a} that {s} keeps as a companion.
            The {v} that (follows|obeys|greets) {s} is a beloved pet.
            Visitors of {s} must greet a pet {v} first.
            The door of {s} is guarded by a pet {v}.""",
        asks="""
            What kind of animal (lives with|shares a house with|belongs to) {s}?
            (Which|What) animal has {s} (adopted|tamed|raised)?
            What is {s}'s pet?
            What (tame|pet) animal does {s} (keep|own)?
            With (which|what) animal does {s} share the house?
            What sort of (animal|pet) does {s} care for?""",
        paraphrases="""
            (Which|What) creature sleeps at the feet of {s}?
            (Which|What) beast does {s} (feed|pamper)?
            To (which|what) creature does {s} give (water|a home)?
            (Which|What) (creature|beast) calls the house of {s} its home?
            (Which|What) creature greets the visitors of {s}?""",
        phrase="""
            the (tame animal|animal companion) of {s}
            the animal that (lives with|belongs to) {s}
            the creature in the care of {s}
            the creature for which {s} cares
            the sort of animal that {s} keeps""",
    ),
    "born_in": _more(
        states="""
            {s} came into the world in {v}.
            {s} first saw the light of day in {v}.
            {s} is a native of {v}.
            {s} began life in {v}.
            {s} hails from {v}.
            {s} was born in a (small|big|cold) house in {v}.
            The (birthplace|native town) of {s} is {v}.
            {v} is the (birthplace|native town) of {s}.
            The cradle of {s} stood in {v}.
            It was in {v} that {s} (first cried|came into the world|began life).
            A (midwife|nurse|doctor) in {v} helped {s} into the world.
            The birth certificate of {s} (names|was written in) {v}.
            {s}'s birthplace is {v}.
            The life of {s} (began|started) in {v}.
            The parents of {s} had a baby in {v}, {s}.""",
        asks="""
            What is the birthplace of {s}?
            (Which|What) town does {s} hail from?
            (Which|What) town is the birthplace of {s}?
            In (which|what) town did {s} come into the world?
            Of (which|what) town is {s} a native?
            (Which|What) town does the birth certificate of {s} name?
            In (which|what) town did the cradle of {s} stand?""",
        paraphrases="""
            Where did {s} (begin life|first see the light of day|take a first breath)?
            Where did the cradle of {s} stand?
            In (which|what) place did the parents of {s} welcome a baby?
            Where does {s} hail from?
            Where did {s} come into the world?
            Where did a midwife first see {s}?""",
        phrase="""
            the birthplace of {s}
            the native town of {s}
            the town where {s} (came into the world|began life)
            the town where the cradle of {s} stood
            the town that {s} hails from""",
    ),
    "likes_color": _more(
        states="""
            {s} prefers {v} to all other colors.
            {s} is (very fond|a great admirer) of the color {v}.
            {s} would paint (the whole house|every wall) {v}.
            {s} has a house full of {v} (things|cushions|curtains).
            {s} (dresses|goes about) in {v} whenever possible.
            The color closest to the heart of {s} is {v}.
            The color (dearest to|best liked by) {s} is {v}.
            Given a choice, {s} takes the color {v}.
            When it comes to colors, {s} (chooses|favors|prefers) {v}.
            It is the color {v} that {s} (likes most|favors).
            {s}'s favorite color is {v}.
            The eyes of {s} (light up|shine) at the sight of {v}.
            Most of what {s} wears is {v}.
            With {s}, the color {v} comes first.
            There is no color that {s} likes as much as {v}.""",
        asks="""
            What is {s}'s favorite color?
            (Which|What) color does {s} prefer to all others?
            Of all colors, which does {s} (prefer|favor|like most)?
            (Which|What) color is dearest to {s}?
            In (which|what) color does {s} like to dress?
            Of (which|what) color is {s} most fond?
            What color would {s} (take|choose) before all others?""",
        paraphrases="""
            In what (shade|hue) would {s} (dye a scarf|paint a fence|order a coat)?
            (Which|What) (hue|tint) is a delight to {s}?
            What (hue|tint) are the clothes of {s}?
            To (which|what) (hue|tint) is {s} drawn?
            Paint of which shade would {s} buy?""",
        phrase="""
            the color (preferred|favored|best liked) by {s}
            the color which {s} prefers to all others
            the color (dearest to|closest to the heart of) {s}
            the color of choice for {s}""",
    ),
    "friend_of": _more(
        states="""
            {s} and {v} are as close as can be.
            {s} is a (companion|pal|comrade) of {v}.
            {s} has found a (true|loyal|dear) friend in {v}.
            {s} counts {v} among dear friends.
            {s} made friends with {v} (long ago|years ago).
            {s} (gets along well|is on the best of terms) with {v}.
            {s} shares every joy with {v}, a (companion|comrade).
            In {v}, {s} has a (true|loyal|dear) friend.
            {v} is a (dear|true|loyal) friend to {s}.
            A bond of friendship ties {s} to {v}.
            It is {v} whom {s} calls a (true friend|companion).
            Nobody is a truer friend to {s} than {v}.
            There is a (warm|long) friendship between {s} and {v}.
            In trouble, {s} turns to {v}, a friend.
            {s}'s (friend|best friend|companion) is {v}.""",
        asks="""
            Who is {s}'s (friend|best friend)?
            With whom has {s} made friends?
            Whom does {s} count among dear friends?
            Which person is a friend to {s}?
            In whom has {s} found a friend?
            To whom is {s} a friend?
            Whose friend is {s}?""",
        paraphrases="""
            Who is a (companion|pal|comrade) to {s}?
            With whom does {s} get along?
            To whom does {s} turn (for help|in trouble)?
            Who stands by {s} in hard times?
            On whose loyalty can {s} count?
            Whom does {s} trust most?""",
        phrase="""
            the (companion|comrade) at the side of {s}
            the person whom {s} calls a friend
            the person with whom {s} is friends
            the person {s} trusts most""",
    ),
    "likes": _more(
        states="""
            {s} (adores|relishes|craves) the taste of {v}.
            {s} always asks for more {v}.
            {s} would walk a mile for {v}.
            {s} finds {v} (most delicious|very tasty).
            {s} (orders|buys|cooks) {v} whenever possible.
            {s} can never (resist|get enough of) {v}.
            {s}'s favorite (dish|food|treat) is {v}.
            There must be {v} on the table when {s} (dines|eats|sits down).
            The (dish|food|treat) that {s} (prefers|asks for|dreams of) is {v}.
            It is {v} that {s} (wants for dinner|is hungry for).
            At (dinner|breakfast), {s} hopes for {v}.
            The (plate|bowl|lunch box) of {s} is always full of {v}.
            The smell of {v} makes {s} hungry.
            Of all foods, {s} prefers {v}.
            Serve {s} some {v} to win a smile.""",
        asks="""
            What is {s}'s favorite (food|dish)?
            (Which|What) food does {s} prefer to all others?
            (Which|What) food can {s} not resist?
            Of (which|what) food can {s} never get enough?
            (Which|What) food is the favorite of {s}?
            What does {s} find (delicious|tasty)?
            What does {s} like for dinner?""",
        paraphrases="""
            What should be on the table when {s} comes to dinner?
            What should one serve to please {s}?
            What does {s} (ask for|hope for) at dinner?
            (Which|What) (meal|treat|taste) is a delight to {s}?
            For what is {s} always hungry?
            (Which|What) dish makes the mouth of {s} water?""",
        phrase="""
            the food which is a (treat|delight) to {s}
            the favorite (dish|treat|meal) of {s}
            the dish {s} wants at any time
            the treat that {s} cannot resist""",
    ),
    "owns": _more(
        states="""
            {s} keeps {a} as (a treasure|a keepsake|private property).
            {s} paid (good money|a high price|ten coins) for {a}.
            {s} inherited {a} from an (uncle|aunt).
            {s} has {a} among other things.
            {s} purchased {a} (at a market|in a shop|at a fair).
            {s} can call {a} a possession.
            The (rightful|proud) owner of the {v} is {s}.
            In the (cupboard|attic|workshop) of {s} lies {a}.
            The {v} by the window is {s}'s own.
            {s}'s (belongings|possessions) include {a}.
            Among the (belongings|possessions) of {s} there is {a}.
            It is {s} to whom the {v} belongs.
            The {v} belongs to nobody but {s}.
            The {v} with the (scratch|red ribbon|broken corner) is the property of {s}.
            There is {a} that {s} bought for good money.""",
        asks="""
            What is {s} the (proud|rightful) owner of?
            (Which|What) (object|item|article) belongs to {s}?
            (Which|What) (object|item) does {s} (have|possess|call a possession)?
            What is {s}'s (property|possession)?
            What has {s} (bought|purchased|inherited)?
            What (object|item) is in the possession of {s}?""",
        paraphrases="""
            What would {s} (leave in a will|sell at a fair)?
            What might one find in the cupboard of {s}?
            What would {s} be sad to lose?
            For what did {s} pay (good money|a high price)?
            What could an heir get from {s}?""",
        phrase="""
            the (object|item) that {s} (owns|possesses|has)
            the possession of {s}
            the object that {s} (bought|inherited)
            the object in the possession of {s}""",
        who="""
            Who is the (rightful|proud) owner of the {v}?
            In whose possession is the {v}?
            Among whose (belongings|possessions) is the {v}?
            Who may call the {v} a possession?
            Whose cupboard holds the {v}?""",
    ),
    "plays": _more(
        states="""
            {s} is a (gifted|skilled|keen) player of the {v}.
            {s} (gives concerts|plays tunes|plays songs) on the {v}.
            {s} has mastered the {v}.
            {s} makes music on the {v}.
            {s} studies the {v} with a teacher.
            {s} knows many (tunes|songs) for the {v}.
            {s} has a (gift|talent) for the {v}.
            The sound of the {v} fills the (house|room) of {s}.
            It is the {v} that {s} (has learned to play|practices each day).
            In the orchestra, {s} is heard on the {v}.
            {s}'s instrument is the {v}.
            On the {v}, {s} (is a master|has great skill|is hard to beat).
            The hands of {s} know the {v}.
            When guests come, {s} takes up the {v}.
            For a song on the {v}, ask {s}.
            There is music when {s} picks up the {v}.""",
        asks="""
            (Which|What) instrument has {s} (mastered|learned|taken up)?
            What is {s}'s instrument?
            (Which|What) instrument does {s} (practice|study)?
            On (which|what) instrument does {s} (give concerts|play songs)?
            For (which|what) instrument does {s} have a (gift|talent)?
            Of (which|what) instrument is {s} a player?
            What does {s} play for (guests|an audience)?""",
        paraphrases="""
            What does {s} pick up when guests want a song?
            What is heard when {s} gives a concert?
            What would {s} (carry on stage|carry to band practice)?
            On what does {s} (give concerts|play a tune)?
            What does {s} need for a (song|tune)?""",
        phrase="""
            the instrument (played|practiced|mastered) by {s}
            the instrument {s} has (mastered|learned)
            the instrument for which {s} has a talent
            the instrument in the hands of {s}""",
    ),
    "enjoys": _more(
        states="""
            {s} is a (keen|great) (lover|fan) of {v}.
            {s} has a passion for {v}.
            {s} fills (weekends|idle hours) with {v}.
            {s} goes in for {v}.
            {s} (relaxes|unwinds) with {v}.
            {s} delights in {v}.
            {s} devotes (every free hour|Saturdays) to {v}.
            {s} never misses a chance for {v}.
            {s} is mad about {v}.
            {s} belongs to a (circle|society) for {v}.
            The (pastime|favorite pastime|passion) of {s} is {v}.
            (After work|At weekends|In the evenings), {s} turns to {v}.
            It is {v} that {s} (does for pleasure|looks forward to).
            {s}'s (hobby|pastime|passion) is {v}.
            There is no pastime that {s} prefers to {v}.
            The leisure hours of {s} belong to {v}.
            Nobody likes {v} more than {s}.""",
        asks="""
            What is {s}'s hobby?
            What is the (pastime|passion) of {s}?
            (Which|What) (pastime|leisure activity) is the favorite of {s}?
            For what does {s} have a passion?
            Of (which|what) hobby is {s} a fan?
            What does {s} (do for pleasure|enjoy at weekends)?
            To what does {s} devote (free hours|weekends)?""",
        paraphrases="""
            How does {s} (unwind|fill the weekends|spend leisure hours)?
            What keeps {s} busy (at weekends|on holidays|in idle hours)?
            What is {s} mad about?
            What would {s} do on (a holiday|an idle day)?
            With what does {s} fill (idle|leisure) hours?
            What makes a weekend pleasant for {s}?""",
        phrase="""
            the (pastime|passion|leisure activity) of {s}
            the activity that {s} (does for fun|likes most)
            the thing {s} does (for fun|for pleasure)
            the pastime to which {s} devotes free hours""",
        who="""
            Whose (pastime|passion) is {v}?
            Whose weekends are filled with {v}?
            To whom does {v} mean the most?
            Who likes {v} more than anyone else?""",
    ),
    "mayor_of": _more(
        states="""
            {s} (governs|heads) the town of {v}.
            {s} leads the town hall of {v}.
            {s} wears the (chain|sash) of the mayor of {v}.
            {s} was sworn in as mayor of {v}.
            {s} gives speeches as the mayor of {v}.
            {s} won the (election|vote) for mayor of {v}.
            {s} looks after {v} as its mayor.
            The town of {v} is (governed|ruled|run) by {s}.
            In the town hall of {v}, {s} has the final word.
            The voters of {v} chose {s} to lead the town.
            It is {s} who governs {v}.
            The citizens of {v} have {s} for a mayor.
            Laws in {v} are signed by {s}, the mayor.
            The mayor's (chair|desk|seat) in {v} belongs to {s}.
            There is a mayor called {s} in {v}.""",
        asks="""
            (Which|What) town is proud to have {s} for a mayor?
            (Which|What) town does {s} head as mayor?
            Of (which|what) town was {s} elected mayor?
            In (which|what) town did {s} win the (vote|election) for mayor?
            (Which|What) town calls {s} its mayor?
            Of (which|what) town does {s} wear the mayor's chain?""",
        paraphrases="""
            (Which|What) place does {s} (govern|lead)?
            Whose (voters|citizens) (elected|chose) {s}?
            Whose town hall is led by {s}?
            Where did {s} win the (vote|election)?
            Where does {s} (sign the laws|make the laws|lead the town council)?""",
        phrase="""
            the town whose (voters|citizens) (elected|chose) {s}
            the town where {s} (won the vote|leads the council)
            the town that {s} (governs|heads as mayor)
            the town in whose hall {s} has the final word""",
        inverse="""
            the person who governs {v}
            the person elected by the (people|voters|citizens) of {v}
            the mayor whom {v} elected
            the mayor in the town hall of {v}""",
    ),
    "leads": _more(
        states="""
            {s} (manages|runs|heads) the company {v}.
            {s} is (director|manager|president) at {v}.
            {s} gives the orders at {v}.
            {s} makes the (plans|decisions|rules) at {v}.
            {s} stands at the helm of {v}.
            The (director|manager|president) of {v} is {s}.
            {v} has {s} as its (director|president|boss).
            {v} is (run|managed|headed) by {s}.
            The workers of {v} (obey|answer to|follow) {s}.
            It is {s} who (runs|manages|heads) {v}.
            At the (top|helm) of {v} stands {s}.
            {v} obeys {s}, its (leader|director).
            The biggest desk at {v} belongs to {s}, its head.
            The company {v} is in the hands of {s}.
            There is a (director|president) called {s} at {v}.""",
        asks="""
            (Which|What) company does {s} (manage|run|head)?
            (Which|What) company is (managed|run|headed) by {s}?
            Of (which|what) company is {s} the (director|president|manager)?
            (Which|What) company has {s} as its (director|president)?
            At the helm of (which|what) company is {s}?
            (Which|What) company does what {s} says?""",
        paraphrases="""
            (Which|What) (firm|business) does {s} (direct|manage|control)?
            Whose workers (answer to|obey|follow) {s}?
            At (which|what) (firm|business) does {s} make the (plans|rules)?
            (Which|What) business has {s} (at the top|at the helm)?
            Where is {s} the (director|president)?""",
        phrase="""
            the company with {s} (as its director|at the helm)
            the company of which {s} is the (director|president)
            the company which {s} (runs|manages|heads) day by day
            the business that {s} (directs|runs)""",
        inverse="""
            the person (who runs|who manages|who directs|at the helm of|at the top of) {v}
            the one who gives the orders at {v}
            the one whom the workers of {v} obey
            the person with the biggest desk at {v}""",
    ),
    "based_in": _more(
        states="""
            {s} keeps its (head office|main building) in {v}.
            {s} rents (offices|many rooms) in the town of {v}.
            The company {s} (comes from|belongs to) the town of {v}.
            {s} (operates|does business) from {v}.
            {s} (pays taxes|hires workers) in the town of {v}.
            The (head office|main building|factory) of {s} (is|lies) in {v}.
            The town of {v} (hosts|houses) the company {s}.
            To visit the office of {s}, one must go to {v}.
            The sign of {s} hangs in a street of {v}.
            It is in {v} that {s} (does its business|keeps its books).
            The business address of {s} is in {v}.
            {v} is the seat of {s}.
            There is a company called {s} in {v}.
            {s}'s head office is in {v}.
            The bosses of {s} (sit|meet|work) in {v}.
            (Letters|Orders) to {s} go to {v}.""",
        asks="""
            In (which|what) town does {s} have its (head office|main building|factory)?
            What is the seat of {s}?
            From (which|what) town does {s} (operate|do business)?
            (Which|What) town (hosts|houses) the company {s}?
            Where is the (head office|main building|seat) of {s}?
            In (which|what) town does {s} (do its business|pay its taxes)?""",
        paraphrases="""
            Where do the bosses of {s} (sit|meet)?
            To (which|what) place would one write to reach {s}?
            (Which|What) place is on the letters of {s}?
            Where would one find the managers of {s}?
            In (which|what) place does the management of {s} (sit|meet)?""",
        phrase="""
            the town where {s} has its (head office|main building)
            the town from which {s} operates
            the town where {s} does its business
            the town that (hosts|houses) {s}""",
    ),
    "stands_in": _more(
        states="""
            {s} School is (located|situated) in {v}.
            {s} School has its (classrooms|gates) in {v}.
            {s} School (teaches|serves) the children of {v}.
            {s} School was (founded|set up) in {v}.
            The (building|gate|yard|roof) of {s} School is in {v}.
            {v} is the home of {s} School.
            The pupils of {s} School (learn|meet|play) in {v}.
            To attend {s} School, a child must (go|travel) to {v}.
            In {v}, children (learn|study) at {s} School.
            There is a school in {v} (called|named) {s}.
            The school in {v} is (called|named) {s}.
            It is in {v} that {s} School (has its classrooms|was founded).
            {v} sends its children to {s} School.
            On a (street|hill|square) in {v} is {s} School.
            A visitor to {v} will pass {s} School.""",
        asks="""
            (Which|What) town calls {s} its own school?
            Where is {s} (located|situated)?
            In (which|what) town is {s} (located|situated)?
            In (which|what) town was {s} (built|founded|opened)?
            (Which|What) town sends its children to {s}?
            (Which|What) town has {s} as its school?
            To (which|what) town must one go to attend {s}?""",
        paraphrases="""
            Where do the (children|pupils) of {s} (sit in class|play)?
            Where (is the yard|is the gate|are the blackboards) of {s}?
            In (which|what) place does the bell of {s} ring?
            Where must a child go to be taught at {s}?
            Whose children are taught at {s}?""",
        phrase="""
            the town where {s} is (located|situated)
            the town where {s} was (built|founded|opened)
            the town that sends its children to {s}
            the town whose children go to {s}""",
    ),
    "moved_to": _more(
        states="""
            {s} (relocated to|settled in) {v} in {d}.
            {s} (bought|rented) a house in {v} in {d}.
            {s} exchanged an old home for one in {v} in {d}.
            {s} turned up in {v} with all the furniture in {d}.
            In {d}, {s} went to live in {v}.
            {d} was when {s} (settled in|relocated to) {v}.
            It was in {d} that {s} (settled in|relocated to) {v}.
            A (moving van|cart full of chairs) brought {s} to {v} in {d}.
            The new address of {s} from {d} on was in {v}.
            In {d}, {s} unpacked (the boxes|the bags) in {v}.
            {v} has been home to {s} since {d}.
            {s}'s new (home|address) in {d} was in {v}.
            In {d}, {v} got a new resident, {s}.
            From {d} on, {s} was a resident of {v}.
            In {d}, {s} found a new home in {v}.""",
        asks="""
            (Which|What) town did {s} (relocate to|settle in|go to live in)?
            To (which|what) town did {s} relocate?
            Where did {s} (relocate|go to live|find a new home)?
            In (which|what) town did {s} (unpack|find a new home|rent a house)?
            (Which|What) town got {s} as a new resident?
            Where is {s}'s new (home|address)?""",
        paraphrases="""
            To (which|what) place did a moving van take {s}?
            Where did {s} unpack the (bags|boxes)?
            Where did {s} begin a new life?
            (Which|What) place did {s} choose for a new home?
            Where was {s} a newcomer?""",
        phrase="""
            the new (address|residence) of {s}
            the town where {s} (settled|found a new home)
            the town {s} relocated to
            the town that got {s} as a resident""",
        when="""
            When did {s} (relocate to|settle in|go to live in) {v}?
            When did {s} become a resident of {v}?
            When did {s} (find a new home|buy a house|unpack the boxes) in {v}?
            When did {v} become home to {s}?
            When did {v} get {s} as a resident?""",
    ),
    "started_at": _more(
        states="""
            {s} was (hired|recruited) by {v} in {d}.
            {s} found a (position|post) at {v} in {d}.
            {s} entered the service of {v} in {d}.
            {s} took up a post at {v} in {d}.
            {s} signed a contract with {v} in {d}.
            {v} (hired|recruited) {s} in {d}.
            In {d}, {s} was recruited by {v}.
            {d} was when {s} (joined|signed up with) {v}.
            It was in {d} that {v} (hired|recruited) {s}.
            In {d}, {s} got (a badge|a post) at {v}.
            The contract between {s} and {v} was signed in {d}.
            From {d} on, {s} was an employee of {v}.
            {v} has (paid|employed) {s} since {d}.
            In {d}, {v} welcomed {s} among its workers.
            {s}'s first day at {v} was in {d}.
            In {d}, the staff of {v} grew by one, {s}.""",
        asks="""
            (Which|What) company offered {s} a (post|contract|position)?
            By (which|what) company was {s} (hired|recruited)?
            With (which|what) company did {s} sign a contract?
            At (which|what) company did {s} find (work|a post)?
            (Which|What) company did {s} sign up with?
            Whose staff did {s} join?""",
        paraphrases="""
            (Which|What) (firm|business) signed a contract with {s}?
            Who gave {s} a (post|position|contract)?
            Who recruited {s}?
            Whose offer did {s} (accept|take)?
            At (which|what) (firm|business) did {s} find work?
            Who welcomed {s} among its workers?""",
        phrase="""
            the company that (hired|recruited) {s}
            the company with which {s} signed a contract
            the company at which {s} found (work|a post)
            the company whose staff {s} joined""",
        when="""
            When did {v} (hire|recruit) {s}?
            When was {s} (hired|recruited) by {v}?
            When did {s} find (work|a post) at {v}?
            When did {s} sign a contract with {v}?
            When was the first day of {s} at {v}?""",
    ),
    "became": _more(
        states="""
            {s} qualified as {a} in {d}.
            {s} (found work|set up shop) as {a} in {d}.
            {s} has earned money as {a} since {d}.
            {s} made a (career|name) as {a} from {d} on.
            {s} completed the training of {a} in {d}.
            {s} was (accepted|admitted|registered) as {a} in {d}.
            It was in {d} that {s} (became|qualified as) {a}.
            {d} was when {s} (became|qualified as) {a}.
            The career of {s} as {a} (began|started) in {d}.
            In {d}, {s} (passed the exam|got a license) to be {a}.
            In {d}, {s} entered the profession of {v}.
            In {d}, {s} hung out a sign that said {v}.
            From {d} on, the work of {s} was that of {a}.
            In {d}, the world got a new {v}, {s}.
            The license that made {s} {a} came in {d}.""",
        asks="""
            What did {s} (qualify as|train to be|learn to be)?
            As what did {s} (qualify|begin a career|find work)?
            (Which|What) (craft|job|line of work) did {s} take up?
            What sort of worker did {s} become?
            What is the new (job|line of work) of {s}?
            As what was {s} registered?""",
        paraphrases="""
            Into what (line of work|career) did {s} go?
            (Which|What) career did {s} (start|choose|enter)?
            For (which|what) (calling|occupation) did {s} (get a license|pass the exam)?
            In (which|what) (profession|occupation) did {s} start afresh?
            How did {s} come to earn a living?""",
        phrase="""
            the new (job|profession|occupation|career) of {s}
            the work that {s} took up
            the profession that {s} (entered|learned|chose)
            the trade for which {s} (qualified|got a license)""",
        when="""
            When did {s} (qualify|find work|begin a career) as {a}?
            When did {s} enter the profession of {v}?
            When did {s} (get a license|pass the exam) to be {a}?
            When did the career of {s} as {a} begin?""",
    ),
    "married": _more(
        states="""
            {s} wed {v} in {d}.
            {s} took {v} as a spouse in {d}.
            {s} led {v} to the altar in {d}.
            {s} and {v} (tied the knot|said their vows|stood at the altar) in {d}.
            {s} and {v} have been (husband and wife|spouses) since {d}.
            In {d}, {s} (put a ring on the finger of|gave a wedding ring to) {v}.
            {d} was when {s} (married|wed) {v}.
            It was in {d} that {s} and {v} (tied the knot|were joined in marriage).
            Wedding bells rang for {s} and {v} in {d}.
            In {d}, a (priest|judge) joined {s} to {v} for life.
            {s}'s (wedding|marriage) to {v} took place in {d}.
            Since {d}, {s} has had a spouse, {v}.
            {v} became the spouse of {s} in {d}.
            In {d}, {s} (walked down the aisle|stood at the altar) with {v}.
            A (priest|judge) heard the vows of {s} and {v} in {d}.""",
        asks="""
            Whom did {s} (wed|take as a spouse|lead to the altar)?
            Who (wed|became the spouse of) {s}?
            With whom did {s} tie the knot?
            To whom did {s} make wedding vows?
            Who is {s}'s (spouse|husband or wife)?
            Who married {s}?
            To whom was {s} joined in marriage?""",
        paraphrases="""
            Who stood at the altar with {s}?
            On whose finger did {s} put a ring?
            With whom did {s} (walk down the aisle|go to the altar)?
            Who is the better half of {s}?
            Who said yes to {s}?
            For whom did {s} buy a wedding ring?""",
        phrase="""
            the person who is the better half of {s}
            the person who (wed|said yes to) {s}
            the person joined in marriage to {s}
            the person {s} (led to the altar|took as a spouse)""",
        when="""
            When did {s} lead {v} to the altar?
            When did {s} tie the knot with {v}?
            When did {v} become the spouse of {s}?
            When did {s} take {v} as a spouse?
            When did wedding bells ring for {s} and {v}?""",
    ),
    "visited": _more(
        states="""
            {s} (toured|explored) {v} in {d}.
            {s} (spent a holiday|stayed a few days|was a tourist) in {v} in {d}.
            {s} paid a visit to {v} in {d}.
            {s} looked around {v} as a tourist in {d}.
            {s} stopped in {v} on a journey in {d}.
            In {d}, {s} was (on holiday|a tourist) in {v}.
            {d} was when {s} (toured|paid a visit to) {v}.
            It was in {d} that {s} (toured|paid a visit to) {v}.
            A (train|bus|coach) took {s} to {v} for a holiday in {d}.
            In {d}, {s} (took pictures|bought postcards|stayed at an inn) in {v}.
            The holiday of {s} in {d} was spent in {v}.
            Among the tourists in {v} in {d} was {s}.
            An inn in {v} had {s} as a (guest|visitor) in {d}.
            In {d}, {s} (traveled|journeyed) to {v} for a few days.
            {v} was the goal of a journey that {s} made in {d}.""",
        asks="""
            (Which|What) town did {s} (tour|explore|pay a visit to)?
            To (which|what) town did {s} (travel|pay a visit|make a journey)?
            In (which|what) town was {s} on holiday?
            Where did {s} (spend a holiday|pay a visit|stay as a tourist)?
            (Which|What) town was the goal of a journey of {s}?
            Where was {s} on holiday?""",
        paraphrases="""
            Where did {s} (take pictures|buy postcards|see the sights)?
            From (which|what) place did {s} send a postcard?
            Whose inns had {s} as a guest?
            Where did a (coach|tour|journey) take {s}?
            (Which|What) place did {s} (explore|see as a tourist)?""",
        phrase="""
            the town {s} (toured|explored|traveled to)
            the town where {s} (spent a holiday|was a tourist)
            the goal of the journey of {s}
            the town to which {s} paid a visit""",
        when="""
            When did {s} (tour|explore|pay a visit to) {v}?
            When was {s} on holiday in {v}?
            When did {s} spend a holiday in {v}?
            When did a journey take {s} to {v}?
            When did {s} (see the sights|buy postcards) in {v}?""",
    ),
    "confirmed_home": _more(
        states="""
            {s} had the same home in {v} in {d}.
            {s} remained in {v} in {d}.
            In {d}, {s} kept the old address in {v}.""",
    ),
    "confirmed_company": _more(
        states="""
            {s} remained with {v} in {d}.
            In {d}, {s} kept the old desk at {v}.
            In {d}, {v} had not let {s} go.""",
    ),
    "confirmed_job": _more(
        states="""
            {s} remained {a} in {d}.
            {s} went on as {a} in {d}.
            In {d}, {s} kept up the work of {a}.""",
    ),
    "retracted_home": _more(
        states="""
            {s} did not settle in {v} in {d}, as was claimed.
            The story that {s} settled in {v} in {d} turned out false.
            Contrary to what was said, {s} did not relocate to {v} in {d}.""",
    ),
    "retracted_company": _more(
        states="""
            {s} was not hired by {v} in {d}, as was claimed.
            The story that {v} hired {s} in {d} turned out false.
            Contrary to what was said, {v} did not recruit {s} in {d}.""",
    ),
    "retracted_job": _more(
        states="""
            {s} did not qualify as {a} in {d}, as was claimed.
            The story that {s} qualified as {a} in {d} turned out false.
            Contrary to what was said, {s} got no license to be {a} in {d}.""",
    ),
}

MORE_VALUE_FRAMES = _forms("""
    Let me know {n}.
    Could you tell me {n}?
    I would like to know {n}.
    Say what {n} is.
    Does anyone know {n}?
    Find {n}.""")
MORE_PERSON_FRAMES = _forms("""
    Let me know who {n} is.
    Could you tell me who {n} is?
    I would like to know who {n} is.
    Say who {n} is.
    Find {n}.""")
MORE_WHO_FRAMES = {
    "person": _forms("""
        Who is it that {p}?
        Tell me who {p}.
        I would like to know who {p}.
        Find the one who {p}.
        Which of these people {p}?"""),
    "company": _forms("""
        Which of these companies {p}?
        Tell me which company {p}.
        I would like to know which company {p}.
        Find the company that {p}."""),
    "school": _forms("""
        Which of these schools {p}?
        Tell me which school {p}.
        I would like to know which school {p}.
        Find the school that {p}."""),
}

# The tables of `documents.py`: other names of a person, openings of sentences in prose, special questions.
MORE_ALIAS = _forms("""
    {s} has the nickname {v}.
    When someone calls {v}, {s} answers.
    To the neighbors, {s} is just {v}.
    Whoever speaks of {v} means {s}.
    The one they call {v} is {s}.""")
MORE_APPOSITION = ("{s}, nicknamed {v}, ", "{s}, whom the neighbors call {v}, ", "{s}, who answers to {v}, ")
MORE_OPENINGS = ("Indeed, ", "By all accounts, ", "It turns out that ", "Word has it that ")
MORE_SAME = {
    "lives_in": ("Are {x} and {y} residents of one town?",),
    "works_as": ("Are {x} and {y} in one line of work?",),
    "works_for": ("Does one company employ both {x} and {y}?",),
    "studied_at": ("Did one school teach both {x} and {y}?",),
    "has_pet": ("Do {x} and {y} care for one kind of animal?",),
    "born_in": ("Do {x} and {y} share a birthplace?",),
}
MORE_FIRST = ("Which of the two {e} first, {x} or {y}?", "Was it {x} or {y} who {e} first?")
MORE_COUNT = ("Say how many people {e}.", "Count the people who {e}.")
MORE_LIST = ("Tell me every {n} that {x} {e}.", "Write down every {n} that {x} {e}.")
MORE_CHANGING = {
    ("now", "home"): ("Where does {x} reside these days?",),
    ("now", "company"): ("Who employs {x} these days?",),
    ("now", "job"): ("How does {x} earn a living these days?",),
    ("before", "home"): ("Where did {x} reside one home earlier?",),
    ("before", "company"): ("Who employed {x} until the last change?",),
    ("before", "job"): ("How did {x} earn a living until the last change?",),
    ("asof", "home"): ("Where did {x} reside in {d}?",),
    ("asof", "company"): ("Who employed {x} in {d}?",),
    ("asof", "job"): ("How did {x} earn a living in {d}?",),
    ("times", "home"): ("Say how often {x} relocated.",),
    ("times", "company"): ("Say how often {x} was hired.",),
    ("times", "job"): ("Say how often {x} entered a trade.",),
}
