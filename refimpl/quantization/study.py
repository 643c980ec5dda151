"""What the chapter's comparisons of trained and searched systems share: texts, new facts, pairs of arms.

An arm is one way to get a model: a system, the system with a part switched off, a baseline. Arms of a system
see the same text in the same order, and are measured on the same documents, so that they can be compared in
pairs; another seed is other text, another order and other draws.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from refimpl.quantization.harness import Item, Measured, Probe, change
from refimpl.quantization.texts import calibration_ids
from refimpl.scoring import BOS, PAD, encode_items
from refimpl.training import IGNORE
from refimpl.world.names import names
from refimpl.world.relations import RELATIONS, ask
from refimpl.world.rng import Rng

__all__ = [
    "compare", "drawn", "fact_questions", "fact_rows", "measure_heads", "mixed_ids", "new_facts",
]  # fmt: skip

Facts = Mapping[tuple[str, str], str]
LEARNT = ("lives_in", "works_as", "has_pet")
_SHIFT = 13  # help texts between the starts of two seeds: a third of them


def mixed_ids(tokenizer: Any, n: int, length: int, seed: int = 0) -> LongTensor:
    """Calibration rows [n, length] of both kinds in turn, stories first; other ones for every seed.

    Parameters: `n`, even; `length` and errors as for `calibration_ids`.

    >>> from refimpl.models import load
    >>> mixed_ids(load("llama-nano")[1], 4, 8).shape
    torch.Size([4, 8])
    """
    if n % 2:
        raise ValueError(f"n must be even, half of each kind, got {n}")
    stories = calibration_ids(tokenizer, n // 2, length, "stories", seed)
    topics = calibration_ids(tokenizer, n // 2, length, "topics", _SHIFT * seed)
    return torch.stack((stories, topics), 1).flatten(0, 1)


def drawn(ids: LongTensor, batch: int, seed: int = 0) -> Callable[[int], LongTensor]:
    """Batches for `refimpl.training.train`: of every step `batch` rows of ids [N, T], with replacement.

    >>> batches = drawn(torch.arange(6).view(3, 2), 4)
    >>> batches(0).shape, torch.equal(batches(1), batches(1)), torch.equal(batches(1), batches(2))
    (torch.Size([4, 2]), True, False)
    """

    def rows(step: int) -> LongTensor:
        generator = torch.Generator().manual_seed(100_003 * seed + step)
        return ids[torch.randint(len(ids), (batch,), generator=generator)]

    return rows


def new_facts(people: int = 20, seed: int = 0) -> dict[tuple[str, str], str]:
    """Where people who occur in no training text live, what they work as, and their pet: (person, relation)
    -> value, three for each of `people`, 1 to 480. Raises ValueError for another number.

    >>> len(new_facts(2)), new_facts(2) == new_facts(2), new_facts(2) == new_facts(2, seed=1)
    (6, True, False)
    """
    unseen = list(names("eval"))
    if not 1 <= people <= len(unseen):
        raise ValueError(f"people must be from 1 to {len(unseen)}, got {people}")
    rng = Rng("quantization", "new facts", seed)
    rng.shuffle(unseen)
    return {(p, r): rng.choice(RELATIONS[r].values) for p in unseen[:people] for r in LEARNT}


def fact_rows(tokenizer: Any, facts: Facts, n: int, length: int = 64, seed: int = 0) -> dict[str, LongTensor]:
    """Training rows of questions and answers about facts in the wordings of training: `input_ids` and
    `labels` [n, length], only answers are to be learnt; padding on the right.

    Raises ValueError for a length that holds no question.

    >>> from refimpl.models import load
    >>> rows = fact_rows(load("llama-nano")[1], new_facts(2), 3)
    >>> learnt = rows["labels"] >= 0
    >>> learnt.shape, bool((rows["input_ids"] == rows["labels"])[learnt].all())
    (torch.Size([3, 64]), True)
    """
    rng, items = Rng("quantization", "fact rows", seed), list(facts.items())
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.full((n, length), PAD)
    labels = torch.full((n, length), IGNORE)
    ids[:, 0] = BOS
    for row in range(n):
        at = 1
        while True:
            (person, relation), value = rng.choice(items)
            question = encode(f"Question: {ask(relation, person, rng)}\nAnswer:")
            answer = encode(f" {value}\n")
            middle, end = at + len(question), at + len(question) + len(answer)
            if end > length:
                break
            ids[row, at:end] = torch.tensor(question + answer)
            labels[row, middle:end] = ids[row, middle:end]
            at = end
        if at == 1:
            raise ValueError(f"length must hold a question and its answer, got {length}")
    return {"input_ids": ids, "labels": labels}


def fact_questions(tokenizer: Any, facts: Facts, seed: int = 0) -> list[Item]:
    """A question in held-out wording for each fact, and its answer with the end of the line, as token ids.

    >>> from refimpl.models import load
    >>> tokenizer = load("llama-nano")[1]
    >>> prompt, answer = fact_questions(tokenizer, {("Balbert", "lives_in"): "Ripon"})[0]
    >>> tokenizer.decode(answer)
    ' Ripon\\n'
    """
    rng = Rng("quantization", "fact questions", seed)
    pairs = [
        (f"Question: {ask(relation, person, rng, 'eval')}\nAnswer:", f" {value}\n")
        for (person, relation), value in facts.items()
    ]
    return encode_items(tokenizer, pairs)


@torch.no_grad()
def measure_heads(
    heads: Callable[[LongTensor], Mapping[str, Tensor]], probe: Probe, batch: int = 8
) -> dict[str, Measured]:
    """As `harness.measure`, for a model that says several things at once, such as early exits and their vote.

    Parameters: `heads`, ids [B, T] -> name -> log-probabilities [B, T, V]; `probe`; `batch`, rows at a time.
    A greedy answer is exact when the likeliest token is right at each of its places.

    >>> uniform = lambda ids: {"uniform": torch.full((*ids.shape, 4), 0.25).log()}
    >>> found = measure_heads(uniform, Probe({"text": torch.ones(3, 5).long()}, {"ask": [([0], [2])]}))
    >>> found["uniform"].nll["text"].round(3).tolist(), found["uniform"].exact["ask"].tolist()
    ([1.386, 1.386, 1.386], [0.0])
    """
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}

    def keep(head: str, what: str, name: str, values: Tensor) -> None:
        held = found.setdefault(head, {"nll": {}, "exact": {}, "answer_nll": {}})[what]
        held[name] = np.append(held.get(name, []), values.double().cpu().numpy())

    for name, ids in probe.documents.items():
        for part in ids.split(batch):
            for head, log_p in heads(part).items():
                loss = F.nll_loss(log_p[:, :-1].mT, part[:, 1:].to(log_p.device), reduction="none")
                keep(head, "nll", name, loss.mean(1))
    for name, items in probe.items.items():
        width = max(len(prompt) + len(answer) for prompt, answer in items)
        for start in range(0, len(items), batch):
            some = items[start : start + batch]
            ids, labels = torch.full((len(some), width), PAD), torch.full((len(some), width), IGNORE)
            for row, (prompt, answer) in enumerate(some):
                end = len(prompt) + len(answer)
                ids[row, :end] = torch.tensor([*prompt, *answer])
                labels[row, len(prompt) : end] = torch.tensor(answer)
            for head, log_p in heads(ids).items():
                wanted = labels[:, 1:].to(log_p.device)
                right = (log_p[:, :-1].argmax(-1) == wanted) | (wanted == IGNORE)
                loss = F.nll_loss(log_p[:, :-1].mT, wanted, reduction="none", ignore_index=IGNORE)
                keep(head, "exact", name, right.all(1))
                keep(head, "answer_nll", name, loss.sum(1))
    return {head: Measured(**values) for head, values in found.items()}


def compare(new: np.ndarray, old: np.ndarray) -> dict[str, Any]:
    """The difference new - old of two arms, from values [S, n] of S seeds on the same n documents or items.

    `value`, `lo`, `hi`: mean over seeds, then the paired bootstrap over documents; `by_seed` [S]: each seed's
    mean; `holds`: the interval excludes 0 and the sign is that of every seed, of three at least.
    Raises ValueError for other shapes.

    >>> compare(np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 1.0]]), np.zeros((3, 2)))["holds"]
    True
    >>> compare(np.array([[1.0, 2.0], [1.0, 3.0], [-1.0, 0.0]]), np.zeros((3, 2)))["holds"]
    False
    """
    new, old = np.asarray(new, float), np.asarray(old, float)
    if new.ndim != 2 or new.shape != old.shape:
        raise ValueError(f"new and old must be [S, n] alike, got {list(new.shape)} and {list(old.shape)}")
    moved, by_seed = change(new.mean(0), old.mean(0)), (new - old).mean(1)
    sign = np.sign(moved.value)
    beyond = moved.lo > 0 or moved.hi < 0
    return {
        "value": round(moved.value, 4), "lo": round(moved.lo, 4), "hi": round(moved.hi, 4),
        "by_seed": by_seed.round(4).tolist(),
        "holds": bool(len(by_seed) >= 3 and beyond and (np.sign(by_seed) == sign).all()),
    }  # fmt: skip
