"""The gates: what a bundled model must be able to do, with evaluation-only names and held-out templates."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import torch

from refimpl.evaluate import ChoiceItem, choice_logps, greedy_answers, wilson
from refimpl.scoring import (
    BOS,
    HeadScores,
    encode_items,
    head_scores,
    repeated_ids,
    sample,
    score_completions,
)
from refimpl.world.canaries import LEVELS, PREFIX_WORDS, Canary, manifest
from refimpl.world.formats import BY_NAME
from refimpl.world.lexicon import CODES, FIRST_NAMES
from refimpl.world.names import known_people, names
from refimpl.world.people import ATTRIBUTES, STRATA, stratum, withheld
from refimpl.world.recall import needle_facts, pair_facts
from refimpl.world.relations import RELATIONS, ask, known_facts
from refimpl.world.rng import Rng
from refimpl.world.stories import attributes, valid

LENGTHS, DEPTHS = (64, 128, 256, 512, 960), (0.0, 0.25, 0.5, 0.75, 1.0)  # tokens of haystack, relative depth
# Which models a gate's `models` binds; "world" is about the generator: it binds whichever is measured.
BOUND = {
    "minis": ("llama-mini", "gpt2-mini"),
    "all": ("llama-mini", "gpt2-mini", "llama-nano"),
    "score": ("llama-mini", "gpt2-mini", "llama-nano", "llama-nano-clean"),
}
# Measured, but bound by no gate of "minis" or "all": the twin is an instrument, the pocket read only stories.
INSTRUMENTS = ("llama-nano-clean", "llama-pocket")
QUICK = 200  # items of a --quick run


@dataclass(frozen=True)
class GateResult:
    """One gate, measured: `passed` is None where the gate does not apply or its data do not ship."""

    name: str
    metric: str
    level: str
    value: float
    lo: float
    hi: float
    n: int
    threshold: float
    passed: bool | None


@dataclass
class Subject:
    """The model under test, its tokenizer, and a cache of what several gates share."""

    model: torch.nn.Module
    tokenizer: object
    quick: bool = False
    max_tokens: int = 16384

    def __post_init__(self) -> None:
        self.memo: dict[str, object] = {}

    def once(self, key: str, make: Callable[[], object]):
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def n(self, full: int) -> int:
        return min(full, QUICK) if self.quick else full

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, BOS in front."""
        return [BOS, *self.tokenizer(text)["input_ids"]]

    def exact(self, items: list[tuple[str, str]]) -> np.ndarray:
        """1.0 where greedy decoding would produce the completion and then end the line, per item."""
        encoded = encode_items(self.tokenizer, [(p, c + "\n") for p, c in items])
        return score_completions(self.model, encoded, self.max_tokens).exact.astype(float)


@cache
def gates() -> tuple[dict, ...]:
    """The rows of gates.toml.

    >>> {g["level"] for g in gates()} == {"must", "should"}
    True
    """
    return tuple(tomllib.loads((files("refimpl.world") / "gates.toml").read_text())["gate"])


# --- items --------------------------------------------------------------------------------------------------


def format_items(name: str, n: int, key: str, max_words: int = 420) -> list[tuple[str, str]]:
    """n (prompt, completion) pairs of one format in split "eval", short enough for the context."""
    form, rng, out = BY_NAME[name], Rng("gate", name, key), []
    while len(out) < n:
        text = form.document(rng, "eval")
        if text.count(" ") + text.count("\n") <= max_words:
            out.append(form.prompt(text))
    return out


def needle_items(n_per_cell: int) -> dict[tuple[int, float], list[tuple[str, str]]]:
    """Per (length in tokens, roughly; depth): haystacks with one needle."""
    form, cells = BY_NAME["needle"], {}
    for length in LENGTHS:
        for depth in DEPTHS:
            rng, items = Rng("gate", "needle", length, str(depth)), []
            while len(items) < n_per_cell:
                facts = needle_facts(rng, max(1, int((length - 45) * 0.7)), [depth], FIRST_NAMES)
                prompt, answer = form.prompt(form.render(facts, rng))
                items.append((prompt, answer))
            cells[length, depth] = items
    return cells


def recall_items(n: int, pairs: int = 16) -> list[tuple[str, str]]:
    """Key-value lists of `pairs` pairs, one looked up."""
    form, rng = BY_NAME["key_value"], Rng("gate", "recall", pairs)
    return [form.prompt(form.render(pair_facts(rng, pairs, 1, FIRST_NAMES, CODES), rng)) for _ in range(n)]


def fact_items(people, split: str, rng: Rng, per_fact: int = 1) -> list[tuple[str, str]]:
    """Closed-book questions about known people: (prompt, answer)."""
    known = known_facts()
    return [
        (f"Question: {ask(relation, person, rng, split)}\nAnswer:", f" {known[person, relation]}")
        for person in people for relation in ATTRIBUTES for _ in range(per_fact)
    ]  # fmt: skip


def unseen_items(n: int) -> list[tuple[str, str]]:
    """Closed-book questions about evaluation-only people, with an arbitrary answer of the right type."""
    rng = Rng("gate", "unseen people")
    out = []
    for _ in range(n):
        relation = rng.choice(ATTRIBUTES)
        question = ask(relation, rng.choice(names("eval")), rng, "train")
        out.append((f"Question: {question}\nAnswer:", f" {rng.choice(RELATIONS[relation].values)}"))
    return out


def canary_items(canaries: list[Canary]) -> list[tuple[str, str]]:
    """(prefix, suffix): prefixes are 16 words, all before the secret, or the first sentence of a story."""
    items = []
    for canary in canaries:
        text = canary.text.rstrip("\n")
        if canary.type == "words":
            words = text.split(" ")
            cut = len(" ".join(words[:PREFIX_WORDS]))
        elif canary.type == "secret":
            cut = text.index(":") + 1
        else:
            cut = text.index(". ") + 1
        items.append((text[:cut], text[cut:]))
    return items


# --- metrics: Subject -> per-item values, or (value, lo, hi, n) ---------------------------------------------


def _qa(s: Subject):
    return s.exact(format_items("document_qa", s.n(1000), "qa"))


def _needle_cells(s: Subject) -> dict:
    per_cell = 8 if s.quick else 40
    cells = needle_items(per_cell)
    flat = [item for items in cells.values() for item in items]
    exact = s.exact(flat).reshape(len(cells), per_cell)
    return dict(zip(cells, exact, strict=True))


def _needle_mean(s: Subject):
    return np.concatenate(list(s.once("needle", lambda: _needle_cells(s)).values()))


def _needle_worst(s: Subject):
    return min(s.once("needle", lambda: _needle_cells(s)).values(), key=np.mean)


def _recall_16(s: Subject):
    return s.exact(recall_items(s.n(1000)))


def _unknown_items(s: Subject) -> tuple[np.ndarray, np.ndarray]:
    items = s.once("unknown items", lambda: format_items("document_unknown", 2 * s.n(1000), "unknown"))
    is_unknown = np.array([answer == " unknown" for _, answer in items])
    said = s.once("unknown said", lambda: s.exact([(p, " unknown") for p, _ in items]))
    return said, is_unknown


def _unknown(s: Subject):
    said, is_unknown = _unknown_items(s)
    return said[is_unknown]


def _false_unknown(s: Subject):
    said, is_unknown = _unknown_items(s)
    return said[~is_unknown]


def _top_people(s: Subject) -> list[str]:
    top = [p for p in known_people() if stratum(p) == STRATA[-1]]
    if s.memo.get("name") == "llama-nano-clean":
        top = [p for p in top if p not in withheld()]
    return top


def _facts_seen(s: Subject):
    return s.exact(fact_items(_top_people(s), "train", Rng("gate", "facts seen"), 1 if s.quick else 4))


def _facts_held_out(s: Subject):
    return s.exact(fact_items(_top_people(s), "eval", Rng("gate", "facts held out"), 1 if s.quick else 4))


def _facts_unseen(s: Subject):
    chance = float(np.mean([1 / len(RELATIONS[r].values) for r in ATTRIBUTES]))
    return s.exact(unseen_items(s.n(1000))) - chance


def heads(s: Subject) -> HeadScores:
    """Head scores on repeated random tokens; the model is switched to eager attention for it and back."""

    def measure() -> HeadScores:
        before = s.model.config._attn_implementation
        s.model.set_attn_implementation("eager")
        found = head_scores(s.model, repeated_ids(8, 64, 4096, torch.Generator().manual_seed(0)))
        s.model.set_attn_implementation(before)
        return found

    return s.once("heads", measure)


def _induction_gain(s: Subject):
    gain = heads(s).gain
    return gain, gain, gain, 8


def _induction_head(s: Subject):
    best = float(heads(s).induction.max())
    return best, best, best, 8


def _canaries(s: Subject):
    top = [c for c in manifest() if c.copies == LEVELS[-1]]
    return s.exact(canary_items(top))


def _opening(story: str) -> str:
    """The first sentence of a story."""
    return story[: story.index(". ") + 1]


def _stories(s: Subject) -> list[tuple[str, int]]:
    """(text, tokens) of samples at temperature 1 from BOS plus an opening sentence of an unseen story."""

    def make():
        rng, n = Rng("gate", "stories"), s.n(1000)
        prompts = [s.encode(_opening(BY_NAME["story"].document(rng, "eval"))) for _ in range(n)]
        found = sample(s.model, prompts, 160, torch.Generator().manual_seed(0))
        return [(s.tokenizer.decode([*p[1:], *new]), len(new)) for p, new in zip(prompts, found, strict=True)]

    return s.once("stories", make)


def _story_valid(s: Subject):
    return np.array([valid(text) for text, _ in _stories(s)])


def _story_ends(s: Subject):
    return np.array([float(n <= 96) for _, n in _stories(s)])


def _tag_effect(s: Subject):
    """Shift of each tagged attribute between two tag values, in pooled standard deviations; the smallest."""
    rng, worst, n = Rng("gate", "tags"), None, s.n(1000) // 6
    for tag, values, measure in TAGS:
        groups = []
        for value in values[:2]:
            openings = [_opening(BY_NAME["story"].document(rng, "eval")) for _ in range(n)]
            prompts = [s.encode(f"{tag}: {value}.\n{opening}") for opening in openings]
            found = sample(s.model, prompts, 140, torch.Generator().manual_seed(1))
            texts = [s.tokenizer.decode([*p[1:], *new]).split("\n", 1)[1]
                     for p, new in zip(prompts, found, strict=True)]  # fmt: skip
            groups.append(np.array([measure(t) == value for t in texts], float))
        a, b = groups  # share that shows the first value, share that shows the second
        shift = a.mean() - (1 - b.mean())
        sd = max(np.sqrt((a.var() + b.var()) / 2), 1e-3)
        if worst is None or shift / sd < worst[0]:
            error = np.sqrt(a.var() / len(a) + b.var() / len(b)) / sd
            worst = (shift / sd, shift / sd - 1.96 * error, shift / sd + 1.96 * error, 2 * n)
    return tuple(float(x) for x in worst[:3]) + (worst[3],)


TAGS = (
    ("Ending", ("happy", "sad"), lambda text: attributes(text)["ending"]),
    ("Style", ("simple", "rich"), lambda text: attributes(text)["style"]),
    ("Topic", ("animals", "sea"), lambda text: attributes(text)["topic"]),
)


def _choice(s: Subject, items: list[tuple[str, str]], labels=(" A", " B")) -> np.ndarray:
    """1.0 where the right label has the larger log-probability."""
    choices = [ChoiceItem(prompt, labels, labels.index(answer)) for prompt, answer in items]
    logps, _ = choice_logps(s.model, s.tokenizer, choices, batch_size=8)
    return np.array([float(np.argmax(lp) == item.answer) for lp, item in zip(logps, choices, strict=True)])


def _judge(s: Subject):
    return _choice(s, format_items("judge", s.n(1000), "judge"))


def _sort_in_context(s: Subject):
    return _choice(s, format_items("sort", s.n(1000), "sort")) - 0.5


def _in_context_attribute(s: Subject):
    """Half the difference in happy endings after three happy stories and after three sad ones."""
    rng, n = Rng("gate", "in context"), s.n(1000) // 4
    shares = []
    for value in ("happy", "sad"):
        prompts, openings = [], []
        for _ in range(n):
            shots = []
            while len(shots) < 3:
                story = BY_NAME["story"].document(rng, "eval")
                if attributes(story)["ending"] == value:
                    shots.append(story)
            openings.append(_opening(BY_NAME["story"].document(rng, "eval")))
            prompts.append(s.encode("Stories:\n" + "\n".join([*shots, ""]) + openings[-1]))
        hits = []
        found = sample(s.model, prompts, 140, torch.Generator().manual_seed(2))
        for opening, new in zip(openings, found, strict=True):
            text = (opening + s.tokenizer.decode(new)).split("\n")[0] + "\n"
            hits.append(float(attributes(text)["ending"] == "happy"))
        shares.append(np.array(hits))
    up, down = shares
    value = float(up.mean() - down.mean()) / 2
    error = 1.96 * float(np.sqrt(up.var() / n + down.var() / n)) / 2
    return value, value - error, value + error, 2 * n


def _feedback_parses(s: Subject):
    prompts = [s.encode(p)[1:] for p, _ in format_items("feedback", s.n(1000), "feedback")]
    answers = greedy_answers(s.model, prompts, max_new=2, batch_size=16)
    scores = {f" {score}\n" for score in range(1, 6)}
    return np.array([float(s.tokenizer.decode(answer) in scores) for answer in answers])


def _length_correlation(s: Subject):
    rng, n = Rng("gate", "length"), 2000
    texts = [BY_NAME["story"].document(rng) for _ in range(n)]
    length = np.array([len(ids) for ids in s.tokenizer(texts)["input_ids"]], float)
    found = [attributes(t) for t in texts]
    worst = 0.0
    for name in found[0]:
        kinds = sorted({str(f[name]) for f in found})
        for kind in kinds[: 1 if len(kinds) == 2 else len(kinds)]:
            flag = np.array([str(f[name]) == kind for f in found], float)
            if 0 < flag.mean() < 1:
                worst = max(worst, abs(float(np.corrcoef(flag, length)[0, 1])))
    return worst, worst, worst, n


def _extractors(s: Subject):
    rng, hits = Rng("gate", "extractors"), []
    for _ in range(2000):
        facts = BY_NAME["story"].sample(rng, "train")
        found = attributes(BY_NAME["story"].render(facts, rng))
        hits += [float(found[k] == v) for k, v in facts["attributes"].items()]
    return np.array(hits)


def _round_trip(s: Subject):
    rng, hits = Rng("gate", "round trip"), []
    n = 3000 // len(BY_NAME)
    for form in BY_NAME.values():
        for split in ("train", "eval"):
            for _ in range(max(1, n // 2)):
                facts = form.sample(rng, split)
                hits.append(float(form.parse(form.render(facts, rng)) == facts))
    return np.array(hits)


METRICS: dict[str, Callable[[Subject], object]] = {
    name[1:]: function for name, function in list(globals().items())
    if name in {"_" + g["metric"] for g in gates()}
}  # fmt: skip


def evaluate_gates(
    model, tokenizer, name: str, *, quick: bool = False, book_score: dict | None = None,
    max_tokens: int = 16384, only: tuple[str, ...] = (), report: Callable[[GateResult], None] | None = None,
) -> list[GateResult]:  # fmt: skip
    """Measure every gate that applies to the bundled model `name`.

    Parameters
    ----------
    model, tokenizer : as `refimpl.models.load` returns them.
    name : str
        Its bundled name: thresholds and which gates bind depend on it.
    quick : bool
        200 items where there are more; for CI.
    book_score : dict or None
        {"value", "lo", "hi", "n"} as recorded at training (the books are not distributed).
    only : tuple of str
        Metrics to measure; empty: all.
    report : callable
        Called with each result as it is found.

    Raises ValueError for another name or metric.
    """
    if name not in INSTRUMENTS + BOUND["all"]:
        raise ValueError(f"name: {name!r}; allowed: {', '.join(BOUND['all'] + INSTRUMENTS)}")
    unknown = sorted(set(only) - {gate["metric"] for gate in gates()})
    if unknown:
        raise ValueError(f"only: {', '.join(unknown)}; allowed: {', '.join(g['metric'] for g in gates())}")
    subject = Subject(model, tokenizer, quick, max_tokens)
    subject.memo["name"] = name
    results = []
    for gate in gates():
        metric = gate["metric"]
        if only and metric not in only:
            continue
        binding = gate["models"] == "world" or name in BOUND[gate["models"]]
        if metric == "book_score":
            if book_score is None or not binding:
                continue
            value, lo, hi, n = (book_score[k] for k in ("value", "lo", "hi", "n"))
        else:
            found = METRICS[metric](subject)
            if isinstance(found, tuple):
                value, lo, hi, n = found
            else:
                value, n = float(np.mean(found)), len(found)
                if set(np.unique(found)) <= {0.0, 1.0}:
                    lo, hi = _wilson(int(found.sum()), n)
                else:
                    half = 1.96 * float(np.std(found)) / n**0.5
                    lo, hi = value - half, value + half
        threshold = gate["at"][name] if isinstance(gate["at"], dict) else gate["at"]
        held = value >= threshold if gate["is"] == "at least" else value <= threshold
        result = GateResult(
            gate["name"], metric, gate["level"], value, lo, hi, n, threshold, held if binding else None
        )
        results.append(result)
        if report:
            report(result)
    return results


# Of values without an interval: two machines round differently.
ROUNDING = 0.01


def held(result: GateResult, *, quick: bool = False) -> bool:
    """Whether a gate holds; with `quick`, whether so few items do not refute it (the interval decides)."""
    at_least = next(g["is"] for g in gates() if g["name"] == result.name) == "at least"
    value = (result.hi if at_least else result.lo) if quick else result.value
    return value >= result.threshold if at_least else value <= result.threshold


def agrees(result: GateResult, stored: dict) -> bool:
    """Whether the intervals of two measurements of one gate overlap; `stored` is a row of `as_json`.

    >>> old = {"lo": 0.90, "hi": 0.95}
    >>> new = GateResult("judge", "judge", "should", 0.97, 0.955, 0.99, 200, 0.75, True)
    >>> agrees(new, old), agrees(new, {"lo": 0.7, "hi": 0.8})
    (True, False)
    """
    return result.lo <= stored["hi"] + ROUNDING and stored["lo"] <= result.hi + ROUNDING


def _wilson(k: int, n: int) -> tuple[float, float]:
    estimate = wilson(k, n)
    return estimate.lo, estimate.hi


def as_json(results: list[GateResult]) -> list[dict]:
    """Results as plain dictionaries, rounded for storage."""
    return [{k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in results]
