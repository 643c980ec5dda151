"""What all prompt pruners share: the result, the units that are kept or dropped whole, token losses.

A unit function maps the text pieces of n tokens to n unit numbers 0, 0, 1, 2, 2, ...: tokens with one number
stand or fall together. Pieces joined give the text, so a unit is also a span of characters.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor, nn

from refimpl.world import lexicon

Units = Callable[[Sequence[str]], list[int]]
MAX_PLACES = 8192  # rows x width of one forward pass

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]+|\s*\n\s*")
_ABBREVIATION = re.compile(r"(\b\w\.\w\.|\b[A-Z][a-z]\.)$")  # "e.g.", "Mr.": no end of a sentence

# The lexicon of the rule-based chunker. A closed list names every determiner, adjective and function word
# that it treats apart; nouns are the world's own words, numbers, and what begins with a capital letter.
_DETERMINERS = frozenset(
    "a an the this that these those his her its their my your our some any no every".split()
)
_ADJECTIVES = frozenset(
    """old young new good great small big little long short red blue green white black free early late
    happy sad quiet cold warm poor rich first last other same own whole best fine deep dark bright high
    low""".split()
)
_FUNCTION = frozenset(
    """i you he she it we they who whom whose which what where when why how one ones everyone nobody
    everybody somebody someone anybody many of in on at to from by with for about as into over under after
    before between like than then and or but nor so if because while though until is are was were be been
    being am has have had having do does did done can could will would shall should may might must not very
    also only just there here besides often again still ever never""".split()
)
_NOUNS = frozenset(
    word.lower()
    for words in (
        lexicon.TOWNS, lexicon.JOBS, lexicon.COMPANIES, lexicon.SCHOOLS, lexicon.ANIMALS, lexicon.FOODS,
        lexicon.OBJECTS, lexicon.COLORS, lexicon.HOBBIES, lexicon.INSTRUMENTS, lexicon.MONTHS,
    )
    for word in words
)  # fmt: skip


@dataclass(frozen=True)
class Pruned:
    """What is left of a prompt.

    Parameters: `keep`, ascending indices [m] of the kept tokens; `scores` [n], what the method thinks of
    each token of the prompt (higher is kept earlier).

    >>> Pruned(torch.tensor([0, 2]), torch.tensor([3.0, 1.0, 2.0])).ids(torch.tensor([7, 8, 9]))
    tensor([7, 9])
    """

    keep: LongTensor
    scores: Tensor

    def ids(self, ids: LongTensor) -> LongTensor:
        """The kept tokens [m] of `ids` [n], in their order; ValueError for a prompt of another length."""
        if ids.shape != self.scores.shape:
            raise ValueError(f"ids: {list(ids.shape)}, but {list(self.scores.shape)} tokens were scored")
        return ids[self.keep]


def pieces(tokenizer: object, ids: LongTensor) -> list[str]:
    """The text of each token [n]; a character that is cut into several tokens reads as "\ufffd"."""
    return [tokenizer.decode([token]) for token in ids.tolist()]


def tokens(pieces: Sequence[str]) -> list[int]:
    """Every token is a unit.

    >>> tokens(["a", "b"])
    [0, 1]
    """
    return list(range(len(pieces)))


def words(pieces: Sequence[str]) -> list[int]:
    """Words, runs of punctuation and line ends, each with the tokens it is written in.

    >>> words(["Kor", "rin", " lives", " here", ".", " He"])
    [0, 0, 1, 2, 3, 4]
    """
    text = "".join(pieces)
    starts = [m.start() for m in _WORD.finditer(text)]
    units, at, word, last, number = [], 0, -1, None, -1
    for piece in pieces:
        inner = at + len(piece) - len(piece.lstrip())  # the leading space belongs to the word behind it
        if inner == at + len(piece):
            inner = at
        while word + 1 < len(starts) and starts[word + 1] <= inner:
            word += 1
        if word != last or number < 0:
            number, last = number + 1, word
        units.append(number)
        at += len(piece)
    return units


def phrases(pieces: Sequence[str]) -> list[int]:
    """Noun phrases by rule; all other words are units of their own.

    A phrase is a determiner, then adjectives and numbers, then nouns. Nouns are the words of the world's
    lexicon, numbers, words with a capital letter, and whatever follows a determiner or an adjective.

    >>> phrases([" The", " old", " baker", " of", " Ri", "pon", " left"])
    [0, 0, 0, 1, 2, 2, 3]
    """
    by_word = words(pieces)
    texts = [""] * (by_word[-1] + 1 if by_word else 0)
    for piece, w in zip(pieces, by_word, strict=True):
        texts[w] += piece
    numbers, number, before = [], -1, "other"
    for text in texts:
        kind = _kind(text.strip(), before)
        joins = kind == "noun" and before in ("determiner", "adjective", "noun")
        joins = joins or (kind == "adjective" and before in ("determiner", "adjective"))
        number += not joins
        numbers.append(number)
        before = kind
    return [numbers[w] for w in by_word]


def _kind(word: str, before: str) -> str:
    lower = word.lower()
    if word[:1].isupper() and lower in _NOUNS:  # "May", which is also a function word
        return "noun"
    if lower in _DETERMINERS:
        return "determiner"
    if lower in _FUNCTION or not word[:1].isalnum():
        return "other"
    if lower in _ADJECTIVES:
        return "adjective"
    if lower in _NOUNS or word[0].isupper() or word[0].isdigit():
        return "noun"
    return "noun" if before in ("determiner", "adjective") else "other"


def sentences(pieces: Sequence[str]) -> list[int]:
    """Sentences: they end with . ! or ? before a space (not after "Mr." or "e.g."), and with a line.

    >>> sentences(["He", " left", ".", " She", " did", " not", ".", "\\n", "So", "!"])
    [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    """
    units, number, text = [], 0, ""
    for piece in pieces:
        ended = text.endswith((".", "!", "?")) and piece[:1] == " " and not _ABBREVIATION.search(text)
        if text and (ended or text.endswith("\n")):
            number += 1
        text = (text + piece)[-8:]
        units.append(number)
    return units


def unit_numbers(pieces: Sequence[str], units: Units) -> LongTensor:
    """Apply a unit function and check what it gives.

    Raises ValueError unless it gives one number per token, from 0 on without gaps, never falling.

    >>> unit_numbers(["a", "b"], tokens)
    tensor([0, 1])
    """
    found = torch.tensor(units(pieces))
    steps = found.diff()
    if found.shape != (len(pieces),) or found[0] != 0 or (steps < 0).any() or (steps > 1).any():
        raise ValueError(
            f"units: expected {len(pieces)} numbers such as 0, 0, 1, ..., got {found.tolist()[:12]}"
        )
    return found


def unit_mean(values: Tensor, units: LongTensor) -> Tensor:
    """The mean [U] of token values [n] over each unit.

    >>> unit_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor([2., 5.])
    """
    return unit_sum(values, units) / units.bincount()


def unit_sum(values: Tensor, units: LongTensor) -> Tensor:
    """The sum [U] of token values [n] over each unit."""
    return torch.zeros(int(units[-1]) + 1, device=values.device).index_add_(0, units, values)


def best_units(scores: Tensor, units: LongTensor, budget: int) -> LongTensor:
    """Keep the units of highest score while they fit; return their token indices, ascending.

    The first unit that does not fit ends it: all kept units score at least as high as all dropped ones, and
    at most one unit less than `budget` tokens stays. Of equal scores the earlier unit is kept first.

    Parameters: scores [U]; units [n], the unit of each token; budget in tokens.

    >>> best_units(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 2]), 3).tolist()
    [2, 3]
    """
    order = scores.sort(descending=True, stable=True).indices
    fits = units.bincount()[order].cumsum(0) <= budget
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[order[fits]] = True
    return kept[units].nonzero()[:, 0]


def check_prompt(ids: LongTensor, budget: int | None = None) -> None:
    """ValueError unless `ids` is a LongTensor [n], n >= 1, and 1 <= budget <= n; TypeError for a budget that
    is no int.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.long or ids.ndim != 1 or ids.numel() == 0:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"ids: expected a non-empty LongTensor [n], got {got}")
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget: expected a number of tokens (int), got {budget!r}")
    if not 1 <= budget <= len(ids):
        raise ValueError(f"budget: {budget} tokens; the prompt has {len(ids)}, allowed: 1 to {len(ids)}")


@torch.no_grad()
def token_losses(model: nn.Module, rows: Sequence[LongTensor], bos: int = 0) -> list[Tensor]:
    """-log p(token | bos, the tokens before it) in nats for every token of every row, each row alone.

    Parameters: model, a causal language model; rows, LongTensors [n_i]; bos, the id put in front of each.
    Returns float32 tensors [n_i] on the model's device. Raises ValueError for a row that is empty or, with
    its bos, longer than the model's context.
    """
    device, context = model.get_input_embeddings().weight.device, model.config.max_position_embeddings
    for i, row in enumerate(rows):
        check_prompt(row)
        if len(row) >= context:
            raise ValueError(f"rows[{i}]: {len(row)} tokens and bos, but the model's context is {context}")
    out: list[Tensor | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        width = 1 + len(rows[order[-1]])
        batch = [order.pop() for _ in range(min(len(order), max(1, MAX_PLACES // width)))]
        ids = torch.full((len(batch), width), bos, device=device)
        for b, i in enumerate(batch):  # padded on the right, where a causal model never looks
            ids[b, 1 : 1 + len(rows[i])] = rows[i].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for b, i in enumerate(batch):
            out[i] = losses[b, : len(rows[i])]
    return out
