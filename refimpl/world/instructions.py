"""Some thirty instructions on lists of words, with computed answers (memory D5).

`instruction`:

    <|user|> Reverse the order of these words: lamp mug chair
    <|assistant|> chair mug lamp

Boundary "<|assistant|>". A combination (task, type of input) with `held_out(task, kind)` occurs only in split
"eval", and "eval" has no others.
"""

from __future__ import annotations

from refimpl.world.base import Facts, Format, Split
from refimpl.world.instruction_tasks import COMBINATIONS, COUNTS, DISTINCT, KIND_NAMES, KINDS, TASKS, members
from refimpl.world.names import names
from refimpl.world.phrasebook import PhraseIndex
from refimpl.world.rng import Rng


def _sample(rng: Rng, split: Split) -> Facts:
    name, kind = rng.choice(COMBINATIONS[split])
    task, pool = TASKS[name], KINDS[kind] or names(split)
    n = rng.between(3, 7)
    words = rng.sample(pool, n + 2)
    spare, words = words[:2], words[2:]
    if name == "longest":
        size = max(map(len, words))
        words = [
            w
            for i, w in enumerate(words)
            if len(w) < size or i == max(range(n), key=lambda j: (len(words[j]), -j))
        ]
        words = words if len(words) >= 2 else [words[0], "cup" if len(words[0]) > 3 else "teapot"]
    facts: Facts = {"task": name, "kind_of_input": kind, "form": rng.below(len(task.forms.forms))}
    for need in task.args.split():
        if need == "in":
            facts["a"] = rng.choice(words)
        elif need == "maybe":
            facts["a"] = rng.choice(words) if rng.random() < 0.5 else spare[0]
        elif need == "notlast":
            facts["a"] = words[rng.below(n - 1)]
        elif need == "new":
            facts["b"] = spare[1]
        elif need == "n":
            facts["n"] = rng.choice(tuple(COUNTS))
            words = words[: 3 if name == "repeat" else n] + ([] if n > 3 or name == "repeat" else [spare[0]])
        elif need == "doubled":
            facts["a"] = rng.choice(words)
            for _ in range(rng.below(3)):
                words.insert(rng.below(len(words) + 1), facts["a"])
            if name == "unique":
                del facts["a"]
        else:  # "kind" and "odd" mix in words of another kind
            other = rng.choice([k for k in DISTINCT if k != kind])
            extra = rng.sample(KINDS[other], 1 if need == "odd" else rng.between(1, 3))
            for word in extra:
                words.insert(rng.below(len(words) + 1), word)
            facts["main" if need == "odd" else "kind"] = kind
    return {**facts, "words": words}


def _render(facts: Facts, rng: Rng) -> str:
    task = TASKS[facts["task"]]
    words = facts["words"]
    text = task.forms.forms[facts["form"]] % {**facts, "words": " ".join(words)}
    return f"<|user|> {text}\n<|assistant|> {task.answer(words, facts)}\n"


_INDEX = PhraseIndex({name: task.forms for name, task in TASKS.items()})


def _kind_of(words: list[str]) -> str:
    return max(KIND_NAMES, key=lambda k: sum(w in members()[k] for w in words))


def _parse(text: str) -> Facts:
    user, _, answer = text.removesuffix("\n").partition("\n<|assistant|> ")
    if not user.startswith("<|user|> "):
        raise ValueError("text: does not start with '<|user|> '")
    name, form, slots = _INDEX.read(user[9:])
    words = slots.pop("words").split()
    facts: Facts = {"task": name, "form": form, **slots, "words": words}
    facts["kind_of_input"] = facts.get("kind") or _kind_of(words)
    if name == "odd":
        facts["main"] = facts["kind_of_input"]
    right = TASKS[name].answer(words, facts)
    if answer != right:
        raise ValueError(f"text: answers {answer!r}; the right answer is {right!r}")
    return facts


FORMATS = [
    Format("instruction", _sample, _render, _parse, "<|assistant|>", ("memory D5", "rag T8")),
]
