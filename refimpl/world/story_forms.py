"""The surface of the stories: word lists, and for every event type the sentences that can tell it.

A template is one line (a line that begins with two spaces goes on). `{P}` is a slot, `(a|b)` an
alternation, `<big>` a word of the story's style (`STYLE`). Each event type owns its sentences: no two types
share a skeleton (asserted when the index is made), so a sentence can be read back to its event.
"""

from __future__ import annotations

TOPICS = ("animals", "sea", "food", "machines")

# Slot -> topic -> nouns. x: a thing that fits in a bag; l: a place; h: a grown-up; m: a thing that is made.
TOPIC_NOUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "x": {
        "animals": tuple("kitten puppy lamb duckling hamster canary tortoise piglet gosling chick".split()),
        "sea": tuple("shell pearl starfish oyster lobster seahorse coral clam buoy spyglass".split()),
        "food": tuple("muffin pancake cookie pumpkin melon pretzel waffle dumpling biscuit cheese".split()),
        "machines": tuple("wheel lever bolt screw magnet motor battery switch valve bulb".split()),
    },
    "l": {
        "animals": tuple("barn stable kennel henhouse pasture farm zoo".split()),
        "sea": tuple("harbor lighthouse dock beach pier lagoon shipyard".split()),
        "food": tuple("bakery kitchen pantry orchard inn dairy cafe".split()),
        "machines": tuple("workshop garage factory forge depot station shed".split()),
    },
    "h": {
        "animals": tuple("shepherd vet zookeeper beekeeper rancher".split()),
        "sea": tuple("sailor captain fisherman diver pirate".split()),
        "food": tuple("baker cook chef grocer miller".split()),
        "machines": tuple("mechanic engineer inventor plumber pilot".split()),
    },
    "m": {
        "animals": tuple("birdhouse hutch saddle feeder coop cage perch".split()),
        "sea": tuple("raft sail paddle canoe rudder kayak dinghy".split()),
        "food": tuple("cake pie pudding loaf tart omelet pizza".split()),
        "machines": tuple("robot clock radio engine tractor pump rocket".split()),
    },
}
TOPIC_TITLES = {"animals": "animals", "sea": "the sea", "food": "food", "machines": "machines"}
OTHER_LOVES = tuple("puzzles riddles jokes songs stories picnics games parades surprises mysteries".split())

SPECIES = tuple("fox bear mouse rabbit badger otter squirrel frog mole hare owl goose".split())
PLACES = tuple(
    """bridge market well church fountain school park tower gate mill library hill square garden
castle forest""".split()
)
RELATIONS = {
    "m": tuple("friend cousin neighbor brother classmate".split()),
    "f": tuple("friend cousin neighbor sister classmate".split()),
}
GIRLS = frozenset(
    """
Agnes Alice Amy Anna Barbara Bertha Bess Carol Clara Claire Daisy Dora Doris Edith Ella Ellen Emily
Emma Esther Ethel Eva Flora Florence Gertrude Grace Greta Hannah Harriet Helen Hilda Ida Irene Jane
Jean Jenny Joan Josephine Julia Kate Laura Lily Louise Lucy Mabel Margaret Maria Martha Mary Maud
Mildred Molly Nancy Nell Nina Nora Olive Polly Rosa Rose Ruth Sarah Sophie Stella Susan Violet
""".split()
)

# key -> (simple words, rich words). A rich word stands in no simple story and the other way round (tested).
STYLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "big": (("big", "huge"), ("enormous", "immense")),
    "small": (("small", "little"), ("tiny", "delicate")),
    "kind": (("kind", "nice", "fun", "jolly"), ("generous", "lively", "curious", "cheerful")),
    "glad": (("glad", "happy"), ("delighted", "overjoyed")),
    "sad": (("sad", "unhappy"), ("miserable", "heartbroken")),
    "ran": (("ran", "raced"), ("scurried", "dashed")),
    "walked": (("walked", "went"), ("wandered", "trudged")),
    "said": (("said", "called"), ("declared", "announced", "remarked")),
    "asked": (("asked", "begged"), ("pleaded", "inquired")),
    "shouted": (("shouted", "yelled"), ("exclaimed", "bellowed")),
    "sighed": (("said", "moaned"), ("murmured", "groaned")),
    "good": (("good", "nice", "great"), ("splendid", "marvelous", "brilliant")),
    "bad": (("bad", "rotten"), ("dreadful", "terrible")),
    "cold": (("cold", "chilly"), ("icy", "frosty")),
    "wet": (("wet", "damp"), ("drenched", "soggy")),
    "fix": (("fix", "mend"), ("repair", "restore")),
    "found": (("found", "saw"), ("discovered", "spotted")),
    "made": (("made", "built"), ("constructed", "assembled")),
    "odd": (("odd", "funny"), ("peculiar", "mysterious")),
    "scared": (("scared", "afraid"), ("terrified", "frightened")),
    "cross": (("cross", "mad"), ("furious", "indignant")),
    "tired": (("tired", "sleepy"), ("exhausted", "weary")),
    "fell": (("fell", "dropped"), ("tumbled", "plunged")),
    "end": (("At last", "Then"), ("Eventually", "At length")),
    "smiled": (("smiled", "grinned"), ("beamed", "rejoiced")),
    "laughed": (("laughed", "giggled"), ("chuckled", "chortled")),
    "cried": (("cried", "wept"), ("sobbed", "whimpered")),
    "home": (("home", "back home"), ("homeward", "homewards")),
    "broke": (("broke", "snapped"), ("shattered", "collapsed")),
    "pulled": (("pulled", "tugged"), ("hauled", "heaved")),
    "gave": (("gave", "handed"), ("presented", "offered")),
    "lovely": (("lovely", "sweet"), ("magnificent", "glorious")),
    "thought": (("thought", "felt"), ("suspected", "believed")),
    "brave": (("brave", "bold"), ("courageous", "fearless")),
    "strong": (("strong", "rough"), ("fierce", "violent")),
    "hid": (("hid", "covered"), ("concealed", "obscured")),
    "stop": (("stopped", "slowed"), ("delayed", "hindered")),
}

# Words that tell the ending; every closing sentence holds at least one of its own side and none of the other.
HAPPY_WORDS = frozenset(
    """
glad happy delighted overjoyed smiled grinned beamed rejoiced laughed giggled chuckled chortled
proud proudly hugged hug danced cheered wonderful party best
""".split()
)
SAD_WORDS = frozenset(
    """
sad unhappy miserable heartbroken cried wept sobbed whimpered alone lonely tears worst sorry gloomy
wished empty never
""".split()
)

FORMS: dict[str, str] = {
    # ------------------------------------------------------------------ how stories begin
    "open_day": """
(One morning|One day|One afternoon|Before breakfast|After school|One Sunday|One spring day|On market day)
  {ak} named {P} (sat|stood|waited|rested|played|hummed|whistled|skipped) (by|near|behind|beside) the {g}.
(Once|Long ago|Far from here|Last summer|Years ago) {ak} named {P} (lived|slept|grew
  up|stayed|worked|played) (by|near|behind|beside) the {g}.
{P} was {ak} who (lived|played|slept|often sat|liked to nap|liked to sing|picked daisies|spent every day)
  (by|near|behind|beside) the {g}.
(Everyone|Everybody) (by|near|around|behind|beside) the {g} knew {ak} (named|called) {P}.
There (was|once was) {ak} (named|called) {P} who lived (by|near|behind|beside) the {g}.
(By|Near|Behind|Beside) the {g}, {ak} named {P} (counted clouds|made plans|sat reading|hopped about|drew
  circles|lay in the grass|looked for friends|ate a sandwich).
{ak!} (named|called) {P} (sat|stood|waited|rested|played|hummed|danced|sang) (by|near|behind|beside) the
  {g} (one morning|all afternoon|after school|at noon).
""",
    "open_night": """
(One night|One evening|Late one night|At midnight|One starry night|After bedtime) {ak} named {P}
  (sat|stood|waited|tiptoed|was awake|counted stars|hummed|crept about|lay awake) (by|near|behind|beside)
  the {g}.
The moon was (up|out|round|high|yellow) when {ak} named {P} (sat|stood|waited|tiptoed|woke)
  (by|near|behind|beside) the {g}.
(Under the moon|By candlelight|In the dark|At dusk) {ak} (named|called) {P}
  (sat|stood|waited|sang|yawned|hummed) (by|near|behind|beside) the {g}.
""",
    # ------------------------------------------------------------------ the companion and what they love
    "friend": """
{He} loved {T}, and so did {his} <kind> {f} {C}.
{His} <kind> {f} {C} (loved|adored|enjoyed|knew all about) {T} too.
{His} <kind> {f} {C} (always talked about|dreamed of|sang about|was crazy about|lived for|collected books
  about) {T}.
{He} and {his} <kind> {f} {C} (loved|adored|enjoyed|dreamed of|talked about|argued about) {T}.
With {his} <kind> {f} {C}, {he} (talked|sang|dreamed|whispered|argued) about {T}.
Nobody loved {T} more than {his} <kind> {f} {C}.
""",
    # ------------------------------------------------------------------ the mood after the trouble
    "worry": """
{P} was so <scared> that {his} (knees|hands|ears|lips) shook.
{P} (gulped|froze|trembled|turned pale), for {he} was <scared>.
{P} felt <scared> and (grabbed|squeezed|held) {C}'s (hand|arm|sleeve).
{C} (saw|knew) that {P} was <scared>.
""",
    "worry:say": """
"(I am|Now I am) <scared>," {P} (whispered|breathed).
"(What now|And now|Is it hopeless)?" {P} <asked>.
"This is <bad>," (whispered|gulped) {P}.
""",
    "anger": """
{P} was so <cross> that {he} (stamped|growled|hissed|turned red|cursed).
{P} (stamped|growled|turned red|shook a fist), for {he} was <cross>.
A <cross> {P} (kicked|hit|slapped) (a stone|a fence|the ground|a stump).
That made {P} (so|really|truly) <cross>.
""",
    "anger:say": """
"(That is|It is|This is) not fair," {P} <shouted>.
"(Why me|Why today|Why us|Why always us)?" {P} <shouted>.
"(Now I am|I am so) <cross>," (snapped|grumbled) {P}.
"What a <bad> (day|mess|trick|joke)," (snapped|grumbled) {P}.
""",
    "courage": """
But {P} was <brave> and (stood tall|only shrugged|kept cool).
{P} took a (deep|long) breath and felt <brave>.
{C} was <scared>, but {P} (winked|stayed calm|stood tall).
""",
    "courage:say": """
"(Let us be|Be|Time to be) <brave>," {P} whispered.
"(Never|Do not) give up," {P} <said>.
"(Chin up|Courage|Come on|No tears), {C}," {P} <said>.
""",
    # ------------------------------------------------------------------ the weather, and what it does
    "rain": """
(Just then|Suddenly|All at once|Meanwhile|Then) <strong> rain (soaked|hit|splashed) their
  (shoes|coats|hats|socks).
(Just then|Suddenly|All at once|Meanwhile|Then) (rain|raindrops|a downpour) made them <wet>.
(Rain|Gray rain|A downpour) (<stop> them|came down) and they got <wet>.
The (rain|downpour) <hid> (the path|the road|the tracks|every sign).
They were <wet>, because (it rained|the rain poured).
They (hid|waited|crouched) under a (tree|cart|roof) from the <strong> rain.
""",
    "snow": """
(Just then|Suddenly|All at once|Meanwhile|Then) <cold> snow (nipped|froze|numbed) their
  (toes|fingers|ears|noses).
(Just then|Suddenly|All at once|Meanwhile|Then) (snow|heavy snow|a blizzard) made them <cold>.
(Snow|White snow|A blizzard) (<stop> them|came down) and they got <cold>.
The (snow|blizzard) <hid> (the path|the road|the tracks|every sign).
They (shivered|froze), because the snow was <cold>.
They (hid|waited|crouched) under a (tree|cart|roof) from the <cold> snow.
""",
    "wind": """
(Just then|Suddenly|All at once|Meanwhile|Then) <strong> wind (pulled|tore|shook) their
  (sleeves|coats|hats|scarves).
(Just then|Suddenly|All at once|Meanwhile|Then) (wind|storm wind|a gale) made them <cold>.
(Wind|Gusty wind|A gale) (<stop> them|blew) and they got <cold>.
The (wind|gale) <stop> them with (dust|leaves|sand) in their eyes.
They (crawled|held hands), because the wind was <strong>.
They (hid|waited|crouched) under a (tree|cart|roof) from the <strong> wind.
""",
    # ------------------------------------------------------------------ plots: trouble, idea, outcome
    "lost": """
They (were taking|were carrying|wanted to take) the {x} to the {l}, but it (was gone|got lost|had vanished).
They (wanted|hoped|meant) to (show|bring) the {h} their {x}, but it (was gone|had vanished|was missing).
On the way to the {l}, their <small> {x} (got lost|went missing|disappeared|fell out unseen).
""",
    "lost.idea": """
{C} <found> (an odd|a muddy|a crooked|a faint) trail that led to the {l}.
So they (turned around|went back) and <found> (crumbs|marks) (near|behind|outside) the {l}.
""",
    "lost.idea:say": """
"Let us (search|check) (the|behind the|under the|around the) {l}," {C} <said>.
"We (must|should) go back (to|past) the {l}," {C} <said>.
""",
    "lost.win": """
<end> the {x} (turned up|lay|was found) (in|under) an (old|upturned) (hat|bucket|basket).
There was the {x}, (safe|unharmed|all dusty|under leaves) (in|beside) a <big> (basket|bucket|sack).
They <found> the {x} (in the tall grass|under a bench|behind a door|in {P}'s own hood).
""",
    "lost.lose": """
They <found> (nothing|only dust|an old sock), but not the {x}.
<end> they gave up, for the {x} stayed lost.
""",
    "stuck": """
They (were playing|were running|played catch) near the {l} when the {x} <fell> (into|down) a deep
  (hole|ditch|shaft).
Their {x} got (away|loose) and was stuck high (up|on the roof|in the tree) (by|at) the {l}.
They (needed|wanted) the {x} (at|for) the {l}, but it <fell> (into|down) a (hole|ditch|drain).
""",
    "stuck.idea": """
{C} (ran|rushed) to (fetch|get|borrow) a (long rope|ladder|pole) (from|at) the {l}.
The {h} (lent|brought) them a <good> (rope|ladder|pole|hook).
""",
    "stuck.idea:say": """
"A (rope|ladder|long pole) will (do|reach it|get it)," {C} <said>.
"(Stand|Climb) on my (back|shoulders)," {C} <said>.
""",
    "stuck.win": """
They <pulled> together, and (out|back) (came|popped|slid) the {x}.
{P} (stretched|reached|leaned) (as far as {he} could|out) and <pulled> the {x} (free|to safety).
""",
    "stuck.lose": """
{C} (stumbled|tripped|let go), and the {x} (stayed|remained) (there|stuck|out of reach).
{P} (slipped|tripped), and the {x} <fell> (even deeper|out of sight|away for good).
""",
    "broken": """
They <made> a {m} for the (fair|parade|contest), but it (fell apart|cracked|came apart) (too early|in their
  arms).
They were (pushing|bringing) their new {m} to the {l} when it (cracked|split|came apart).
{P} (leaned|sat|stepped) on the {m} for the {h}, and it (cracked|split|came apart).
""",
    "broken.idea": """
{C} (took|got|brought) (glue|string|tape|wax) to <fix> the {m}.
They (asked|begged) the {h} to help them <fix> the {m}.
""",
    "broken.idea:say": """
"We can <fix> it with (string|tape|wax|glue)," {C} <said>.
"The {h} (can|could|will) help us <fix> it," {C} <said>.
""",
    "broken.win": """
(Bit by bit|Piece by piece) they put the {m} together, better than before.
<end> the {m} was whole, and it won (first prize|a ribbon|a gold cup).
""",
    "broken.lose": """
But the {m} <broke> (again|once more) and was past saving.
<end> the {m} lay in (a hundred|a thousand|ten) pieces.
""",
    "race": """
They (wanted to win|had entered|were leading) the race to the {l}, but {P} (twisted an ankle|lost a
  shoe|took a wrong turn).
In the race to the {l} for a {x}, {P} <fell> (on {his} nose|in the mud).
They had (practiced|trained) for the race to the {l}, yet {P} <fell>.
""",
    "race.idea": """
{C} (turned back|came back|stopped) and (carried|lifted|took) {P} on {chis} back.
{C} <found> a (shortcut|cart|sled|wheelbarrow) and (pushed|dragged) {P} along.
""",
    "race.idea:say": """
"(Hop|Jump|Climb) (on my back|into this cart|on)," {C} <shouted>.
"(Lean on|Hold on to) me and run," {C} <shouted>.
""",
    "race.win": """
Side by side they (flew|shot|burst) past (everyone|the others|the crowd) and won.
<end> they crossed the line (first|ahead of all|by a nose).
""",
    "race.lose": """
<end> they crossed the line (last|far behind|after everyone).
Everyone else (passed|overtook) them, and the prize was gone.
""",
    "road": """
They (had|were) to bring the {h} a {x}, but (a tree|a rock|a wall) blocked the road.
The {h} (was waiting|waited) for their {x}, but the (river|flood) (washed away|swept off) the footbridge.
They (set off|left) for the {l} with a {x}, but a <big> (rock|tree|wagon) blocked the way.
""",
    "road.idea": """
{C} (knew|showed {P}) a (secret|narrow|winding) (trail|tunnel) (under|around) it.
They <made> a (ladder|bridge|path) out of (planks|branches|logs).
""",
    "road.idea:say": """
"(Crawl|Squeeze) (under|around|past) it with me," {C} <said>.
"We can (build|lay) a bridge," {C} <said>.
""",
    "road.win": """
It (held|worked), and they delivered the {x} (just in time|safe and sound|in one piece).
<end> they were across, and the {x} was (safe|unharmed|whole).
""",
    "road.lose": """
But they came (too late|hours late|after dark) with the {x}.
Halfway over, the {x} <fell> (into the mud|in the water|out of the bag).
""",
    "shy": """
A new (boy|girl|child) (sat|stood) (behind|outside|near) the {l}, too <scared> to (play|talk|join them).
They wanted to (play|make friends) with the new (boy|girl|child) at the {l}, who (only hid|ran off|looked
  away).
""",
    "shy.idea": """
So {P} (shyly|bravely|politely) <gave> the newcomer a {x}.
{C} (put|left|laid) a <lovely> {x} (on a step|in the grass) and (waited|stood back).
""",
    "shy.idea:say": """
"(Do you want|Would you like) my {x}, too?" {P} <asked>.
"(Let us|We could|We should) (share|show) our {x}," {C} <said>.
""",
    "shy.win": """
<end> the newcomer took the {x} and (played|sang|talked) with them.
The newcomer (peeked out|came closer|looked up) and shared the {x} with them.
""",
    "shy.lose": """
But the newcomer (ran off|walked off|hid again) and left the {x}.
The newcomer (turned|walked) away and by (noon|dark) had moved (on|off).
""",
    "secret": """
{C} had a secret {x}, and {P} (told|blabbed to|whispered it to) the {h} by (mistake|accident).
{P} (promised|swore) to keep {C}'s {x} secret, but {he} told (everybody|the teacher|half the town).
""",
    "secret.idea": """
{P} (picked flowers|wrote a letter|drew a card|baked rolls) and <ran> to {C}.
{P} <ran> after {C} and (admitted|confessed) (it|everything).
""",
    "secret.idea:say": """
"I (talked|blabbed), and that was wrong," {P} <sighed>.
"(Can you|Will you|Could you) forgive me, {C}?" {P} <asked>.
""",
    "secret.win": """
{C} (nodded|winked|took {P}'s hand) and let {him} (see|hold) the {x}.
<end> {C} forgave {P} and told {him} (another|a better) secret.
""",
    "secret.lose": """
But {C} (hid|locked up) the {x} and (would not|did not) (answer|look up|speak).
{C} (shut|slammed) the door, and (that was all|nothing helped).
""",
    "recipe": """
They <made> a {m} for the {h}'s birthday, but (it leaned badly|one side was missing|it was upside down).
For the {h} they <made> a {m}, but it (smoked|fizzed|turned green|smelled of soap).
{P} tried to surprise {C} with a {m}, but it (smoked|fizzed|wobbled) and (toppled|tipped) over.
""",
    "recipe.idea": """
They (swept it up|scraped it off|started over|held their noses) and (added|used)
  (honey|glitter|ribbons|paint|flowers).
The {h} showed them how to (save|rescue) the {m}.
""",
    "recipe.idea:say": """
"(Put|Stick|Pour) (honey|glitter|ribbons|flowers) (on top|on it)," {C} <said>.
"(Once more|Again), but (measure|be patient|read) this time," {C} <said>.
""",
    "recipe.win": """
It (looked|was) <odd>, but everyone (clapped for|loved|wanted) the {m}.
<end> the {m} came out (perfect|just right|even better).
""",
    "recipe.lose": """
(Then|But) the {m} (sank|burst|caved in), and (nobody|no one) (wanted|touched) it.
<end> the {m} was worse, and the (guests|others) <walked> off.
""",
    "rescue": """
They came to see the {l}, but the {h} was (stuck|trapped|locked) (on the roof|in the cellar|inside).
They (heard|followed) a <odd> (knocking|moaning): the {h} was (locked|trapped) in the {l}.
They wanted a {x} from the {h}, who was (stuck in a well|stuck in a tree|locked in a tower).
""",
    "rescue.idea": """
{P} (climbed|crawled) (in|through a window|over the wall) while {C} <ran> for help.
They (stacked|piled) (boxes|crates|barrels) as high as the (window|roof).
""",
    "rescue.idea:say": """
"(Hold on|Wait|Do not move), we will help," {C} <shouted>.
"(Push|Pull) while I climb in," {P} <said>.
""",
    "rescue.win": """
<end> the {h} was (free|safe|out) and <gave> them a {x}.
They <pulled> the {h} (out|to safety) and (got|earned) a {x}.
""",
    "rescue.lose": """
But a beam <broke>, and the {h} hurt (an arm|a leg|a foot).
<end> (others|some men) came, and the {h} (blamed|scolded) them both.
""",
    "trade": """
{P} (swapped|traded) {C}'s {x} for a (whistle|kite|top hat), but {C} (wanted|needed) it back.
They (hoped|meant) to trade a {x} for a {m}, but the {h} (cheated|tricked|fooled) them.
""",
    "trade.idea": """
So {P} (gave up|took off|offered) {his} own (boots|scarf|hat|drum) (for|to get) it.
They <ran> (after|back to) the {h} and (showed|explained) the mistake.
""",
    "trade.idea:say": """
"Please (take|have) my (boots|scarf|drum) (for it|instead)," {P} <said>.
"An honest trade is a <good> trade," {C} <said>.
""",
    "trade.win": """
The {h} (nodded|laughed|shook hands) and <gave> them the {x} (back|for free).
<end> the {h} (was fair|felt sorry) and returned the {x}.
""",
    "trade.lose": """
But the {h} (had sold|had lost) the {x} (already|at noon|long ago).
The {h} (only yawned|shook a fist|shut the gate) and kept the {x}.
""",
    "blame": """
The {x} they (shared|treasured) was gone, and {P} <thought> {C} (took it|was to blame).
{P} (came|ran|hurried) to the {l} for {his} {x}, found (none|nothing), and (blamed|scolded) {C}.
""",
    "blame.idea": """
{C} pointed to (some|faint|fresh|odd little) footprints (near|behind|outside) the {l}.
{P} (remembered|noticed) that {he} had (forgotten|dropped) something (at|in) the {l}.
""",
    "blame.idea:say": """
"(Ask|Go and ask) around before you blame me," {C} <said>.
"I never (touched|took|saw) it, so look again," {C} <said>.
""",
    "blame.win": """
{P} (found|spied) the {x} in {his} own (bag|pocket|basket|bed) and blushed.
<end> {P} (saw|found) the {x} (at home|under {his} hat) and {C} forgave {him}.
""",
    "blame.lose": """
Too late {P} found the {x}, for {C} had lost (trust|faith|heart).
<end> {P} knew {he} was wrong, but {C} (sulked|turned away|would not listen).
""",
    "thief": """
They (put|left|set) the {x} on a (step|wall|bench) (to nap|to rest|to stretch), and a (raven|crow|thief)
  took it.
They were (guarding|watching) the {h}'s {x} when a (raven|crow|thief) (took|stole) it.
""",
    "thief.idea": """
They (set|laid) a trap with (a coin|a ring|a button) (in|near|behind) the {l}.
{P} (followed|chased|trailed) the (feathers|tracks|dust) all the way to the {l}.
""",
    "thief.idea:say": """
"(Look|Quick), it (went|hid|flew) (into|behind) the {l}," {C} <shouted>.
"We can set a trap (in|at|behind) the {l}," {C} <said>.
""",
    "thief.win": """
(Snap|Click|Bang) went the trap, and the {x} was (safe|theirs again|saved).
<end> {P} caught the {x} in {his} (hat|arms|scarf).
""",
    "thief.lose": """
But the thief (got away|was faster), and the {x} (with it|was gone).
<end> the thief (laughed at|fooled) them and kept the {x}.
""",
    "fear": """
They had to (fetch|get) a {x} from the {l}, but something (growled|moaned|creaked) (there|inside).
{P} (wanted|needed) the {x} (in|behind) the {l}, but a ghost (lived|walked) there.
""",
    "fear.idea": """
{C} (lit|held up) a (candle|lamp|torch), and they (crept|tiptoed) in.
They (sang|hummed|counted) (out loud|together) and (crept|tiptoed) (inside|closer).
""",
    "fear.idea:say": """
"(Take|Hold) my hand and (sing|hum)," {C} <said>.
"(Ghosts|Monsters) do not (bite|exist), so (come|walk)," {C} <said>.
""",
    "fear.win": """
It was only (an old door|a gust of air|an owl snoring), and they got the {x}.
The (ghost|monster) was (just|only) a (sheet|coat|curtain), so they took the {x}.
""",
    "fear.lose": """
(Something|A shadow) (moved|jumped), and they <ran> off without the {x}.
<end> the (light|candle|lamp) went out, and they left the {x}.
""",
    "map": """
A (torn|crumpled) map showed a {x} (near|behind) the {l}, but they looked in vain.
They (searched|were searching) for a {x} (near|behind) the {l}, but the map (seemed wrong|made no sense).
""",
    "map.idea": """
{C} (turned|tilted|flipped) the map (around|upside down|sideways), and (it all|suddenly it) made sense.
They (asked|showed) the {h}, who (wiped|turned|unfolded) the map.
""",
    "map.idea:say": """
"We (held|read) the map (wrong|upside down)," {C} <shouted>.
"(Take|Try|Walk) (ten|two|five) steps to the (left|right)," {C} <said>.
""",
    "map.win": """
(Creak|Click) went a door, and there (was|sat|lay) the (precious|fabled|promised) {x}.
<end> they <found> the {x} in a (hollow tree|secret room|cave).
""",
    "map.lose": """
<end> they (learned|heard) that (someone|others|a stranger) had taken the {x}.
The map was (fake|a joke|a trick), and there was no {x}.
""",
    "show": """
They gave a show (in|at|outside) the {l} with a (dancing|talking|singing) {m}, but {P} forgot {his}
  (lines|words|song).
They (planned|acted) a play about a {x} for the {h}, but {P} (went blank|froze on stage).
""",
    "show.idea": """
{C} (jumped|ran|danced) on stage and (sang|made up|whispered) the (words|missing part).
{C} (pulled|made) <odd> faces so (all|the crowd) forgot about {P}.
""",
    "show.idea:say": """
"(Just|Now) (hum|whistle|dance) while I sing," {C} (whispered|hissed).
"(Repeat|Say) (it|the words) after me," {C} (whispered|hissed).
""",
    "show.win": """
<end> the crowd (rose|stood up|jumped up) and (clapped|threw roses|shouted for more).
The crowd (roared|clapped) and the {h} <gave> them (flowers|a medal|silver coins).
""",
    "show.lose": """
But the crowd (booed|yawned|left) and the (curtain|lights) went down.
<end> (nobody|no one) clapped and the (crowd|children) left.
""",
    "share": """
They had one {x} (for lunch|for the trip|left), but the {h} (had nothing|looked hungry|had none).
They saved their only {x} for the (fair|feast), but met a (poor|lame|ragged) {h}.
""",
    "share.idea": """
{P} (sighed|nodded|gulped) and <gave> the {x} to the {h}.
So {C} (put|pressed|laid) the {x} in the {h}'s (hands|lap|bag).
""",
    "share.idea:say": """
"(Here|Please), (take|have) our {x}," {P} <said> (kindly|shyly).
"You need the {x} more than we do," {C} <said>.
""",
    "share.win": """
The {h} (filled|opened) a sack (with|of) (gold|sweets|gifts) for them.
<end> the {h} came back with (two of them|ten more|a whole box).
""",
    "share.lose": """
The {h} (sold|lost|hid) it (around the corner|that same hour).
<end> the {h} just left, and their (bag|basket|sack) was bare.
""",
    # ------------------------------------------------------------------ how stories end
    "end_laugh": """
They <laughed> until their (sides|bellies|cheeks) (hurt|ached).
{P} and {C} <laughed>, and (the moon|even a cow|everyone) joined in.
{P} and {C} <laughed> all the way (home|back).
""",
    "end_laugh:say": """
"(We did it|Hooray|What luck|What a day)!" {P} <shouted>, and they <laughed>.
"(Again|Same time tomorrow|Shall we go again)?" {C} <asked>, and both <laughed>.
""",
    "end_proud": """
{P} was (very|really|truly) proud (of|to know) {C}, and <glad>.
{P} and {C} (walked|marched|skipped) home, (proud|proudly) and <glad>.
The two were proud and <glad> (for years|all week|until bedtime).
""",
    "end_proud:say": """
"I am proud of (you|us)," {C} <said>, and {P} <smiled>.
"Best {f} (of all|ever)," {P} <said>, and {C} <smiled>.
""",
    "end_hug": """
{P} hugged {C}, and (they|both) were <glad> (together|again|until bedtime).
They hugged, <smiled>, and (danced|skipped|ran|walked) home.
With a (long|warm|tight) hug, {P} <smiled> at {C}.
""",
    "end_hug:say": """
"(Thank you|Well done|You saved the day)," {P} <said>, and hugged {C}.
"(Friends forever|We are a team|Always together)," {C} <said>, and {P} <smiled>.
""",
    "end_party": """
That (evening|night) they had a <lovely> party with (lanterns|music|dancing|fireworks).
They danced at a <lovely> party until (dawn|midnight).
Everyone cheered and (threw|held) a <lovely> party.
""",
    "end_party:say": """
"(Time for|Now for) a party!" {C} <shouted>, and everyone cheered.
"(Best day|Most wonderful day|The best day) ever," {P} <said>, and danced (home|off|away).
""",
    "end_cry": """
{P} and {C} (sat down|hid their faces|sat on a stone) and <cried>.
{P} <cried> (all night|until dark), and {C} <cried> too.
Then {P} <cried>, and (warm|salty|hot) tears ran down.
""",
    "end_cry:say": """
"(It is my fault|I miss it so|Why us)," {P} <sighed>, and <cried>.
"(Please do not cry|Hush now|Come home)," {C} <said>, but {P} <cried>.
""",
    "end_alone": """
{P} <walked> off alone, (kicking|counting) (pebbles|stones|leaves).
{P} (sat|stayed|ate supper) alone and was <sad>.
It was a lonely (walk|way) for {P}, who was <sad>.
""",
    "end_alone:say": """
"(Leave me|Go away|Let me be)," {P} <sighed>, and sat there alone.
"I want to be alone," {P} <sighed>, and <walked> off.
""",
    "end_regret": """
{P} was sorry and <sad>, and so was {C}.
{P} wished (it were yesterday|to start over|for better luck), and was <sad>.
The two crept home, sorry and <sad>.
""",
    "end_regret:say": """
"I am (so|very|truly) sorry," {P} <sighed>, and {C} was <sad>.
"I wish we (had stayed home|could start over)," {P} <sighed>, <sad>.
""",
    "end_gloomy": """
They <walked> <home>, gloomy and <tired>, and nobody (spoke|sang|joked).
It was the worst (day|night) of all, and they were <sad>.
The (road|street) (was|seemed) empty, and {P} was <sad>.
""",
    "end_gloomy:say": """
"(Worst day ever|The worst day|The worst luck)," {C} <sighed>, <sad>.
"Never (try|do) that again," {P} <sighed>, <sad>.
""",
}
