"""The phrases of dialogues: acts of the user, moods, openers, questions and replies of the assistant."""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.world.phrasebook import NAME, Phrases
from refimpl.world.session_dates import WHEN

SLOTS = {
    "when": WHEN,
    "When": WHEN,
    "who": f"(?:my [a-z]+ {NAME}|she|he)",
    "Who": f"(?:My [a-z]+ {NAME}|She|He)",
    "kin": "[a-z]+",
    "pet": NAME,
    "weather": "[a-z]+",
}
SHE = ("sister", "aunt", "niece", "mother", "grandmother")
HE = ("brother", "uncle", "nephew", "father", "grandfather")
KIN = SHE + HE
PRONOUN = {**dict.fromkeys(SHE, "she"), **dict.fromkeys(HE, "he")}
WEATHERS = tuple("sunny rainy cold warm windy cloudy foggy stormy hot wet dry chilly".split())


@dataclass(frozen=True)
class Act:
    """One thing a user can say: its topic, its importance from 1 to 10 and its surface forms."""

    topic: str
    importance: int
    phrases: Phrases
    articles: tuple[str, ...] = ()  # fields that also appear as "a mug"


def _act(topic: str, importance: int, templates: str, *articles: str) -> Act:
    return Act(topic, importance, Phrases(templates, **SLOTS), articles)


ACTS = {
    "lives": _act(
        "home",
        5,
        """
I live in {town}.
My home is in {town}.
I have a small house in {town}.
You should know that I live in {town}.
{town} is the town where I live.
These days I am at home in {town}.
My address is in {town}.
I am writing to you from my home in {town}.""",
    ),
    "moved": _act(
        "home",
        8,
        """
I moved to {town} {when}.
{When} I moved to {town}.
We packed everything and moved to {town} {when}.
I have a new home in {town}. I moved {when}.
My new home is in {town} since {when}.
{When} I left my old town and went to live in {town}.
The big change is done: {when} I moved to {town}.
I now live in {town}. The move was {when}.""",
    ),
    "works_as": _act(
        "work",
        5,
        """
I work as {a_job}.
My job is {job}.
I am {a_job}.
I earn my living as {a_job}.
At work I am {a_job}.
For a living I work as {a_job}.
People know me as {a_job}.
I spend my days working as {a_job}.""",
        "job",
    ),
    "new_job": _act(
        "work",
        8,
        """
I started a new job {when}: I am {a_job} now.
{When} I became {a_job}.
I changed my job {when}. Now I work as {a_job}.
{When} was my first day as {a_job}.
I gave up my old job and became {a_job} {when}.
I have a new job. I began as {a_job} {when}.
They took me as {a_job} {when}.""",
        "job",
    ),
    "works_at": _act(
        "work",
        5,
        """
I work for {company}.
My company is {company}.
The firm I work for is called {company}.
{company} is the firm that pays me.
My office is at {company}.
I am with a firm called {company}.
Every morning I go to my desk at {company}.""",
    ),
    "has_pet": _act(
        "pets",
        5,
        """
I have {a_animal} called {pet}.
My {animal} is called {pet}.
There is {a_animal} in our house. Its name is {pet}.
I keep {a_animal} and its name is {pet}.
We have {a_animal} named {pet}.
{pet} is my {animal}.
At home {a_animal} called {pet} waits for me.
You have not met {pet}, my {animal}.""",
        "animal",
    ),
    "pet_died": _act(
        "pets",
        9,
        """
My {animal} {pet} died {when}.
{When} we lost {pet}, our old {animal}.
{pet}, my {animal}, died {when}.
{When} our {animal} {pet} died.
We had to say goodbye to our {animal} {pet} {when}.""",
    ),
    "pet_news": _act(
        "pets",
        2,
        """
{pet} slept all day.
{pet} ran after a ball in the yard.
{pet} would not eat this morning.
{pet} made a mess in the kitchen.
{pet} sat on my chair again.
I took {pet} for a long walk.
{pet} hid under the bed when the bell rang.""",
    ),
    "favourite_food": _act(
        "food",
        3,
        """
My favourite food is {food}.
Nothing tastes better to me than {food}.
These days I like {food} best.
Of all foods I like {food} most.
I could eat {food} every day.
If I may choose, I always choose {food}.
The food I like best is {food}.""",
    ),
    "ate": _act(
        "food",
        1,
        """
I had {food} for lunch.
We ate {food} and talked for an hour.
There was nothing but {food} in the kitchen.
I made {food} for dinner.
I bought {food} at the market.
A friend gave me some {food}.
I burned the {food} a little.""",
    ),
    "hobby": _act(
        "hobby",
        3,
        """
My hobby is {hobby}.
In my free time I enjoy {hobby}.
I have taken up {hobby}.
My free days are for {hobby}.
My great love is {hobby}.
Nothing calms me like {hobby}.
I spend my evenings with {hobby}.""",
    ),
    "favourite_color": _act(
        "taste",
        2,
        """
My favourite color is {color}.
I like {color} better than any other color.
If I had to pick a color, it would be {color}.
The color I like best is {color}.
I want to paint my room {color}, the color I love.
For me the finest color is {color}.""",
    ),
    "bought": _act(
        "shopping",
        3,
        """
I bought {a_object} {when}.
{When} I bought {a_object}.
{When} I found {a_object} in a shop and bought it.
I got myself {a_object} {when}.
I paid far too much for {a_object} {when}.
{When} I went to the market and came home with {a_object}.
I needed {a_object}, so I bought one {when}.""",
        "object",
    ),
    "lost": _act(
        "shopping",
        4,
        """
I lost my {object} {when}.
{When} I lost my {object}.
My {object} is gone. I lost it {when}.
{When} I left my {object} somewhere and never found it.
Somebody took my {object} {when}.
I cannot find my {object}. I lost it {when}.""",
    ),
    "plan_trip": _act(
        "travel",
        4,
        """
I will travel to {town} {when}.
{When} I am going to {town}.
I have a plan: {when} I will visit {town}.
I am going on a trip to {town} {when}.
{When} I will take the train to {town}.
My bag is ready, because I go to {town} {when}.
I want to see {town}, and I will be there {when}.""",
    ),
    "visited": _act(
        "travel",
        4,
        """
I was in {town} {when}.
{When} I went to see {town}.
{When} I spent a day in {town}.
I came back from {town} {when}.
I took a trip to {town} {when}.
{When} I walked about in {town} for hours.""",
    ),
    "kin_lives": _act(
        "family",
        4,
        """
{Who} lives in {town}.
{Who} has a house in {town}.
{Who} has a home in {town}.
{town} is the town where {who} lives.
If I remember well, {who} lives in {town}.
{Who} lives far from me, in {town}.""",
    ),
    "kin_works": _act(
        "family",
        4,
        """
{Who} works as {a_job}.
{Who} is {a_job}.
{Who} earns a living as {a_job}.
As for work, {who} is {a_job}.
{Who} has been {a_job} for years.
{Who} found work as {a_job}.""",
        "job",
    ),
    "kin_moved": _act(
        "family",
        6,
        """
{Who} moved to {town} {when}.
{When} {who} moved to {town}.
{Who} has a new home in {town} since {when}.
{When} {who} left for {town} to live there.
{Who} now lives in {town}. The move was {when}.""",
    ),
    "kin_visit": _act(
        "family",
        4,
        """
{Who} came to see me {when}.
{When} {who} came to see me.
{Who} met me for a cup of tea {when}.
{When} {who} and I had lunch together.
{Who} knocked at my door {when}.""",
    ),
    "weather": _act(
        "weather",
        1,
        """
It is {weather} today.
What a {weather} day it is!
The weather is {weather} again.
It has been {weather} since the morning.
Here it is {weather}, as always.
Outside it is {weather}.""",
    ),
    "greet": _act(
        "greeting",
        1,
        """
Hello!
Good morning!
Good evening!
Hi, it is me again.
Hello, how are you?
Are you there?
I am back.""",
    ),
    "reply": _act(
        "",
        1,
        """
It is fine, I think.
Not really.
Yes, of course.
Sometimes.
I would rather not say.
That is a long story.
A little.
More than you think.
I never thought about that.
Maybe.""",
    ),  # to a question of the assistant; stays in its topic
    "bye": _act(
        "farewell",
        1,
        """
That is all for today.
I have to go now.
Goodbye!
Good night!
See you soon!
Let us talk again another day.
Thank you, that is enough for now.""",
    ),
}
TOPIC_OF = {name: act.topic for name, act in ACTS.items()}

MOODS = {
    "happy": (
        "I am so happy!",
        "I could sing.",
        "It makes me smile.",
        "I feel wonderful.",
        "That is a great joy.",
    ),
    "sad": (
        "I feel sad about it.",
        "I could cry.",
        "It makes my heart heavy.",
        "I am quite unhappy.",
        "It hurts.",
    ),
    "angry": (
        "I am so angry!",
        "It makes my blood boil.",
        "I want to shout.",
        "That was not fair.",
        "I am furious.",
    ),
    "tired": (
        "I am tired.",
        "I need some sleep.",
        "I can hardly stand.",
        "It wears me out.",
        "My eyes fall shut.",
    ),
    "worried": (
        "I worry a lot.",
        "I am a little afraid.",
        "I hope nothing goes wrong.",
        "It keeps me awake.",
        "I do not feel safe.",
    ),
}
MOOD_NAMES = tuple(MOODS)
MOOD_OF = {tail: mood for mood, tails in MOODS.items() for tail in tails}
OPENERS = (
    "Guess what!",
    "Oh, one more thing.",
    "I have news.",
    "By the way!",
    "Now to something else.",
    "Listen.",
    "Before I forget it.",
    "There is something I want to tell you.",
    "You know what?",
    "Another matter.",
)

ASKS = {  # questions of the assistant, by topic
    "home": (
        "How do you like it there?",
        "Is your house a big one?",
        "Do you like your neighbours?",
        "What can you see from your window?",
    ),
    "work": (
        "How is your work?",
        "What did you do at work today?",
        "Do you like the people at work?",
        "Do you get up early for your job?",
    ),
    "pets": ("Does it sleep in your room?", "What does it eat?", "How old is it?", "Who takes care of it?"),
    "food": (
        "Do you cook it yourself?",
        "Who taught you to cook?",
        "Are you hungry now?",
        "Was there enough for all?",
    ),
    "hobby": (
        "How did you come to that?",
        "Do you do it alone?",
        "How often do you do it?",
        "Is it hard to learn?",
    ),
    "taste": (
        "Why that one?",
        "Do you wear it too?",
        "Was it always so?",
        "Have you painted your door like that?",
    ),
    "shopping": ("Was it expensive?", "Where was that?", "What did it look like?", "Do you need it often?"),
    "travel": (
        "Do you go by train?",
        "Who will come with you?",
        "What is there to see?",
        "Have you been there before?",
    ),
    "family": (
        "Do you see each other often?",
        "Are you close?",
        "How long have you known?",
        "Do you write letters?",
    ),
    "weather": ("Do you have an umbrella?", "Will you stay at home?", "Is it good for the garden?"),
}
ASK_TOPIC = {text: topic for topic, texts in ASKS.items() for text in texts}
ACKS = Phrases("""
I see.
How nice to hear that.
Thank you for telling me.
That is good to know.
I will remember that.
Oh, really?
That sounds like you.
I am glad that you tell me.
Tell me more when you like.
Good to know, {user}.
I will keep that in mind, {user}.
I did not know that.
That is quite something.
Well, well.
I understand.
Noted.
All right, {user}.
That says a lot about you.
It is always good to talk with you, {user}.
What a day!""")
KIND_ACKS = {
    "sad": ("I am sorry to hear that.", "That must be hard for you.", "I feel with you.", "Take your time."),
    "angry": ("I can see why.", "Try to stay calm.", "That was not right.", "Breathe slowly."),
    "tired": ("Get some rest.", "Go to bed early tonight.", "You work too much.", "A cup of tea may help."),
    "worried": (
        "All will be well.",
        "Do not worry too much.",
        "You are not alone.",
        "Let us hope for the best.",
    ),
    "happy": ("I am happy for you!", "That is wonderful!", "What good news!", "You deserve it."),
}
KIND_MOOD = {text: mood for mood, texts in KIND_ACKS.items() for text in texts}
GREETINGS = Phrases("""
Hello, {user}.
Good to see you, {user}.
Welcome back, {user}.
Here I am, {user}.
Hello {user}, what is new?""")
FAREWELLS = Phrases("""
Goodbye, {user}.
Take care, {user}.
Until next time.
Sleep well, {user}.
It was good to talk with you, {user}.""")
