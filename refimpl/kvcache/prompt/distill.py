"""LLMLingua-2, the training: an offline teacher, its noise, and the student that learns from it.

Any `llm: Callable[[str], str]` that compresses a text by deletion can be the teacher of `make_pairs`. The one
that ships, `WorldTeacher`, needs no network: it reads the synthetic world by the world's own rules, so that
the words which carry a fact are known. `Noisy` spoils it as a language model would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from refimpl.kvcache.prompt.annotation import Annotation, annotate, lemma, split_words, trusted
from refimpl.kvcache.prompt.llmlingua2 import TokenClassifier
from refimpl.kvcache.prompt.units import words
from refimpl.world.base import Split
from refimpl.world.documents import read_passage
from refimpl.world.formats import BY_NAME
from refimpl.world.memory_relations import FILLERS
from refimpl.world.names import names
from refimpl.world.relations import RELATIONS, pronoun
from refimpl.world.rng import Rng

# Words that say nothing of their own in any sentence of the world.
_EMPTY = frozenset(
    """a an the this that these those his her he she it its in on at of to by for with from as is are was were
    be been has have had and or not there who one""".split()
)
_SYNONYMS = {
    "lives": "resides", "home": "residence", "works": "labours", "work": "employment", "job": "occupation",
    "friend": "companion", "friends": "companions", "married": "wed", "school": "academy",
    "studied": "learned", "pet": "beast", "color": "hue", "likes": "adores", "plays": "performs",
    "visited": "toured",
    "mayor": "chief", "company": "firm", "leads": "heads", "town": "borough", "moved": "relocated",
    "owns": "holds", "born": "delivered", "became": "turned", "hobby": "pastime", "started": "commenced",
}  # fmt: skip


@cache
def _specificity() -> dict[tuple[str, str], float]:
    """(word, relation) -> P(relation | word) over the statement templates of all relations."""
    counts: dict[str, dict[str, int]] = {}
    for name, relation in RELATIONS.items():
        for template in relation.states:
            for word in {w.lower() for w in split_words(template)} - _EMPTY:
                by_relation = counts.setdefault(word, {})
                by_relation[name] = by_relation.get(name, 0) + 1
    return {(w, r): n / sum(by.values()) for w, by in counts.items() for r, n in by.items()}


@cache
def _reader(split: Split, he_or_she: str) -> str:
    """A sentence to put before a sentence with a pronoun, so that it can be read alone."""
    name = next(n for n in names(split) if pronoun(n) == he_or_she)
    return f"{name} lives in Ripon." if split == "train" else f"{name} is living in Ripon."


@cache
def sentence_facts(sentence: str) -> tuple[tuple[str, ...], ...]:
    """The facts that one sentence of the world states, its pronoun resolved to anybody; () for a filler."""
    he_or_she = "he" if "he" in split_words(sentence.lower()) else "she"
    for split in ("train", "eval"):
        try:
            return tuple(map(tuple, read_passage(f"{_reader(split, he_or_she)} {sentence}")[0][1:]))
        except ValueError:
            continue
    return ()


class WorldTeacher:
    """Compress a text of the world to its fact-bearing words, by deletion.

    Of a sentence it keeps, for every fact: the subject (also as pronoun), the value, the date, and one word
    that tells the relation, the most specific one in the world's table of statements (of equals the longest).
    Sentences without a fact go.

    >>> WorldTeacher()("As many know, Balbert lives in Ripon. It was a quiet day.")
    'Balbert lives Ripon.'
    """

    def __call__(self, text: str) -> str:
        kept = (self._sentence(s) for s in text.replace("\n", " ").split(". "))
        return " ".join(s for s in kept if s)

    def _sentence(self, sentence: str) -> str:
        sentence = sentence.strip().removesuffix(".") + "."
        facts = sentence_facts(sentence)
        if not facts:
            return ""
        found = split_words(sentence)
        keep = {"."}
        for subject, relation, *values in facts:
            for field in (subject, *values):
                keep.update(w for w in split_words(field) if w.lower() not in _EMPTY)
            keep.update(w for w in found if w.lower() in ("he", "she"))
            keep.update(self._cue(found, relation, keep))
        out = " ".join(w for w in found if w in keep)
        return out.replace(" .", ".")

    @staticmethod
    def _cue(found: Sequence[str], relation: str, named: set[str]) -> list[str]:
        if relation == "alias":
            return [w for w in found if w in ("called", "known", "name")][:1]
        table = _specificity()
        cues = [(table.get((w.lower(), relation), 0.0), len(w), w) for w in found if w not in named]
        best = max((cue for cue in cues if cue[2].isalpha()), default=(0.0, 0, ""))
        return [best[2]] if best[0] else []


class Noisy:
    """A teacher that disobeys now and then.

    Parameters: teacher; rng; light, the chance of each word to be dropped or reworded (half each); heavy, the
    chance of a text to be reworded throughout, and the same chance again to be stuttered (every word thrice).
    """

    def __init__(
        self, teacher: Callable[[str], str], rng: Rng, light: float = 0.04, heavy: float = 0.08
    ) -> None:
        self.teacher, self.rng, self.light, self.heavy = teacher, rng, light, heavy

    def __call__(self, text: str) -> str:
        draw, out = self.rng.random(), []
        for word in self.teacher(text).split():
            chance = self.rng.random()
            if draw < self.heavy and chance < 0.6:
                out.append(self._reword(word))
            elif self.heavy <= draw < 2 * self.heavy:
                out += [word] * 3
            elif chance < self.light / 2:
                out.append(self._reword(word))
            elif chance >= self.light:
                out.append(word)
        return " ".join(out)

    @staticmethod
    def _reword(word: str) -> str:
        return _SYNONYMS.get(word.lower(), f"un{word.lower()}ish")


def make_text(rng: Rng, split: Split, longest: int = 170) -> str:
    """A biography, cut to `longest` words, with a filler behind every fourth sentence."""
    body = BY_NAME["biography"].document(rng, split).rstrip("\n").split(". ")
    out: list[str] = []
    for sentence in body:
        out.append(sentence.removesuffix(".") + ".")
        if rng.chance(0.25):
            out.append(rng.choice(FILLERS))
        if sum(s.count(" ") + 1 for s in out) > longest:
            break
    return " ".join(out)


@dataclass(frozen=True)
class Pair:
    """A text as tokens [n], their labels [n] (0 drop, 1 keep), and how far they can be trusted."""

    ids: list[int]
    labels: list[int]
    annotation: Annotation


def make_pairs(texts: Sequence[str], llm: Callable[[str], str], tokenizer: object) -> list[Pair]:
    """Let `llm` compress every text, annotate, and carry the labels of words to their tokens."""
    decode, base, out = cache(lambda token: tokenizer.decode([token])), cache(lemma), []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        texts_of_tokens = [decode(token) for token in ids]
        units = words(texts_of_tokens)
        written = [""] * (units[-1] + 1)
        for piece, unit in zip(texts_of_tokens, units, strict=True):
            written[unit] += piece
        annotation = annotate([w.strip() for w in written], split_words(llm(text)), lemma=base)
        out.append(Pair(ids, [int(annotation.labels[u]) for u in units], annotation))
    return out


def keep_trusted(pairs: Sequence[Pair], worst: float = 0.1) -> list[Pair]:
    """The pairs that pass both filters of `annotation.trusted`."""
    return [pairs[i] for i in trusted([p.annotation for p in pairs], worst)]


def batch_of(pairs: Sequence[Pair], device: torch.device | str = "cpu") -> tuple[LongTensor, LongTensor]:
    """ids [B, T] and labels [B, T], padded on the right with id 1 and label -100."""
    width = max(len(p.ids) for p in pairs)
    ids, labels = torch.full((len(pairs), width), 1), torch.full((len(pairs), width), -100)
    for row, pair in enumerate(pairs):
        ids[row, : len(pair.ids)] = torch.tensor(pair.ids)
        labels[row, : len(pair.ids)] = torch.tensor(pair.labels)
    return ids.to(device), labels.to(device)


def train(
    pairs: Sequence[Pair], *, seed: int, steps: int, batch: int = 32, lr: float = 2e-3,
    device: torch.device | str = "cpu", causal: bool = False, **geometry: int,
) -> tuple[TokenClassifier, list[float]]:  # fmt: skip
    """Train a student by token cross-entropy (AdamW, one cycle); return it and the loss of every step.

    torch's global random state is left as it was. Raises ValueError for no pairs or steps < 1.
    """
    if not pairs or steps < 1:
        raise ValueError(f"pairs, steps: {len(pairs)}, {steps}; at least one of each is needed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TokenClassifier(causal=causal, **geometry)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    rng, losses = np.random.default_rng(seed), []
    for _ in range(steps):
        ids, labels = batch_of([pairs[i] for i in rng.integers(0, len(pairs), batch)], device)
        loss = F.cross_entropy(model(ids, labels != -100).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return model.eval(), torch.stack(losses).tolist()


def f1(scores: Sequence[Tensor], pairs: Sequence[Pair]) -> np.ndarray:
    """F1 of "keep" per text [N], each text cut to as many tokens as its labels keep, highest scores first.

    At equal counts precision and recall are the same number, so no threshold has to be chosen for anybody.
    """
    out = []
    for score, pair in zip(scores, pairs, strict=True):
        labels = torch.tensor(pair.labels, device=score.device).bool()
        top = score.sort(descending=True, stable=True).indices[: int(labels.sum())]
        out.append(float(labels[top].float().mean()))
    return np.array(out)
