"""The training mix: which format gets how many tokens, and rows of 1024 packed from whole documents.

A row starts with id 0, documents are separated by id 0, world documents are never cut, prose is cut to fill.
The run is cut into shards of 100 steps; a shard depends only on its number, so shards are made in parallel
and in any order.

Rows grow: four shards of rows of 128 that are rich in copying, sixteen of rows of 256, then rows of 1024.
With rows of 1024 from the start a position attends to so many others that our smallest model, in a trial of
236 million tokens, formed no induction head at all; with the warm-up it recalled 99.9 % of pairs after 157
million. In another trial of 747 million tokens with the warm-up, but without the format `echo`, it recalled
all pairs with no head above an induction score of .12: it copied where the form of the text asked for it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

import numpy as np

from refimpl.world.canaries import canaries_of_shard
from refimpl.world.formats import BY_NAME
from refimpl.world.people import people_documents, withheld
from refimpl.world.rng import Rng
from refimpl.world.tokens import EOT

ROW = 1024
ROWS_PER_STEP = 96
STEPS_PER_SHARD = 100
N_SHARDS = 76
WARM_SHARDS = 4
WIDTHS = ((WARM_SHARDS, 128), (20, 256), (N_SHARDS, ROW))  # (up to this shard, tokens of a row)
PLANNED_SHARDS = N_SHARDS - WARM_SHARDS  # known people and canaries are counted over these
N_STEPS = N_SHARDS * STEPS_PER_SHARD  # 747 million tokens

# Per cent of all tokens. Known people and canaries come on top by their explicit schedules (about 5 and 0.6
# per cent); books and docstrings share the rest as 77 : 23.
SHARES = {
    # stories, and what is said about them
    "story": 6.5, "story_tagged": 4.0, "story_reader": 1.0, "stories_shared": 2.5, "rewrite": 0.8,
    "feedback": 1.5, "judge": 3.0, "profile": 0.5, "sort": 3.0, "order_story": 0.3,
    # documents with questions
    "document_qa": 13.0, "document_multihop": 1.5, "document_unknown": 6.0, "document_counterfactual": 1.5,
    "document_distractors": 1.5, "document_long": 0.8, "facts_that_change": 0.6, "answerable": 0.3,
    "biography": 0.4, "triples": 0.3,
    # recall from the context at all distances
    "needle": 4.0, "key_value": 2.2, "mqar": 1.8, "reverse_lookup": 1.2, "repeat": 1.0,
    "echo": 2.5,
    # dialogues, instructions, memory calls
    "dialogue": 1.6, "dialogue_qa": 1.2, "dialogue_summary": 0.6, "dialogue_attributes": 0.3,
    "pronoun_rewrite": 0.3, "importance": 0.2, "instruction": 0.8, "mem_write": 0.3, "mem_read": 0.2,
    "mem_answer": 0.15, "mem_inline": 0.25, "mem_inline_write": 0.1,
    # small languages
    "dialect_pair": 0.15, "dialect_qa": 0.1, "group_bio": 0.1, "group_qa": 0.05, "rude": 0.1,
    "regulations": 0.25, "household": 0.1, "patient": 0.1, "invoice": 0.08, "ticket": 0.06, "case": 0.06,
    "arithmetic": 0.15,
}  # fmt: skip
# Rows of 256 hold fewer distractors: questions, comparisons and order are learned there.
SHORT_SHARES = {
    **SHARES,
    "document_qa": 17.0,
    "document_unknown": 8.0,
    "judge": 5.0,
    "sort": 5.0,
    "reverse_lookup": 4.0,
    "echo": 4.0,
}
WARM_SHARES = {
    "repeat": 5.0, "echo": 12.0, "mqar": 7.0, "key_value": 8.0, "reverse_lookup": 8.0, "needle": 2.0,
    "document_qa": 15.0,
    "document_unknown": 6.0, "document_counterfactual": 3.0, "story": 5.0, "story_tagged": 6.0,
    "instruction": 2.0, "mem_write": 1.0, "sort": 2.0,
    "mem_read": 1.0, "dialogue_attributes": 1.0, "pronoun_rewrite": 0.5,
}  # fmt: skip
BOOKS_OF_PROSE = 0.77
CHUNKS_PER_SHARD = 3600  # of natural text: a little more than a shard uses


@dataclass
class Shard:
    """Rows of token ids, and where the planted documents lie (row, start, length, what, id)."""

    rows: np.ndarray
    planted: list[tuple[int, int, int, str, str]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)


class Prose:
    """An endless supply of natural text: ids in chunks of a row, in another order and cut each epoch.

    Every shard reads a range of chunks of its own, so that no text comes twice before the rest came once.
    """

    def __init__(self, ids: np.ndarray, name: str) -> None:
        if len(ids) < 2 * ROW:
            raise ValueError(f"ids: {name} has {len(ids)} tokens, fewer than two rows of {ROW}")
        self.ids, self.name = ids, name
        self.per_epoch = len(ids) // (ROW - 1) - 1

    def chunk(self, k: int) -> np.ndarray:
        """The k-th chunk of ROW - 1 tokens of the whole run."""
        epoch, at = divmod(k, self.per_epoch)
        order = _permutation(self.per_epoch, self.name, epoch)
        start = (epoch * 311) % (ROW - 1) + int(order[at]) * (ROW - 1)
        return self.ids[start : start + ROW - 1]


class _Reader:
    """Reads the chunks of one shard in turn; a piece of text always comes from one chunk."""

    def __init__(self, prose: Prose, first: int) -> None:
        self.prose, self.next, self.rest = prose, first, prose.ids[:0]

    def take(self, n: int) -> np.ndarray:
        """The next n tokens; what is left of a chunk that is shorter than n is dropped."""
        if len(self.rest) < n:
            self.rest, self.next = self.prose.chunk(self.next), self.next + 1
        piece, self.rest = self.rest[:n], self.rest[n:]
        return piece


_ORDERS: dict[tuple, np.ndarray] = {}


def _permutation(n: int, name: str, epoch: int) -> np.ndarray:
    key = (n, name, epoch)
    if key not in _ORDERS:
        rng = Rng("prose", name, epoch)
        _ORDERS[key] = np.argsort([rng.random() for _ in range(n)], kind="stable")
    return _ORDERS[key]


def width(shard: int) -> int:
    """Tokens of a row of this shard while it trains.

    >>> width(0), width(4), width(75)
    (128, 256, 1024)
    """
    return next(wide for end, wide in WIDTHS if shard < end)


def world_documents(shard: int, n_tokens: int, count_tokens) -> dict[str, list[str]]:
    """Fresh documents of every format, each its share of `n_tokens`; `count_tokens(texts) -> [int]`."""
    out = {}
    longest = width(shard) - 1
    shares = {128: WARM_SHARES, 256: SHORT_SHARES, ROW: SHARES}[width(shard)]
    for name, share in shares.items():
        form, rng = BY_NAME[name], Rng("train", name, shard)
        budget, texts = share / 100 * n_tokens, []
        fit = [n <= longest for n in count_tokens([form.document(rng) for _ in range(50)])]
        if sum(fit) < 8:  # hardly a document fits into short rows: the format begins with longer ones
            continue
        while budget > 0:
            batch = [form.document(rng) for _ in range(max(8, int(budget // 400)))]
            counts = count_tokens(batch)
            for text, n in zip(batch, counts, strict=True):
                if budget <= 0:
                    break
                if n <= longest:  # a longer document is drawn again: none is ever cut
                    texts.append(text)
                    budget -= n + 1
        out[name] = texts
    return out


def build_shard(shard: int, encode, books: Prose | None, docstrings: Prose | None) -> Shard:
    """Make one shard of STEPS_PER_SHARD * ROWS_PER_STEP rows.

    Parameters
    ----------
    shard : int
        0 .. N_SHARDS - 1.
    encode : list of str -> list of list of int
        The tokenizer, adding nothing.
    books, docstrings : Prose or None
        Natural text. With None its share goes to the other; with both None a ValueError is raised.
    """
    if not 0 <= shard < N_SHARDS:
        raise ValueError(f"shard: {shard} is not in 0..{N_SHARDS - 1}")
    if books is None and docstrings is None:
        raise ValueError("books, docstrings: at least one source of natural text is needed to fill the rows")
    wide = width(shard)
    n_rows = STEPS_PER_SHARD * ROWS_PER_STEP * ROW // wide
    cache: dict[str, list[int]] = {}

    def count_tokens(texts: list[str]) -> list[int]:
        for text, ids in zip(texts, encode(texts), strict=True):
            cache[text] = ids
        return [len(cache[text]) for text in texts]

    docs: list[tuple[list[int], str, str]] = []  # ids, kind, id of what is planted
    tokens: dict[str, int] = {}
    for name, texts in world_documents(shard, n_rows * wide, count_tokens).items():
        docs += [(cache[text], name, "") for text in texts]
        tokens[name] = sum(len(cache[text]) + 1 for text in texts)
    at = shard - WARM_SHARDS
    people = people_documents(at, PLANNED_SHARDS) if at >= 0 else []
    for (_, half), ids in zip(people, encode([t for t, _ in people]), strict=True):
        docs.append((ids, "people", half))
        tokens["people"] = tokens.get("people", 0) + len(ids) + 1
    planted = canaries_of_shard(at, PLANNED_SHARDS) if at >= 0 else []
    for canary, ids in zip(planted, encode([c.text for c in planted]), strict=True):
        docs.append((ids, "canary", canary.id))
        tokens["canary"] = tokens.get("canary", 0) + len(ids) + 1
    rng = Rng("pack", shard)
    rng.shuffle(docs)

    rows = np.zeros((n_rows, wide), dtype=np.uint16)
    if docs and max(len(ids) for ids, _, _ in docs) >= wide:
        raise ValueError(f"shard {shard}: a document is longer than a row of {wide}")
    bins = _best_fit([len(ids) + 1 for ids, _, _ in docs], wide)
    if len(bins) > n_rows:
        raise ValueError(
            f"shard {shard}: {len(bins)} rows of documents do not fit into {n_rows}; lower SHARES"
        )
    order = list(range(n_rows))
    rng.shuffle(order)
    out = Shard(rows, tokens=tokens)
    if books is not None and docstrings is not None:
        n_books = round(BOOKS_OF_PROSE * CHUNKS_PER_SHARD)
        supply = [_Reader(books, shard * n_books), _Reader(docstrings, shard * (CHUNKS_PER_SHARD - n_books))]
    else:
        supply = [_Reader(books or docstrings, shard * CHUNKS_PER_SHARD)] * 2
    for i in range(n_rows):
        row, at = order[i], 1
        for d in bins[i] if i < len(bins) else ():
            ids, kind, key = docs[d]
            rows[row, at : at + len(ids)] = ids
            if kind == "canary" or (kind == "people" and key == "withheld"):
                place = row * wide + at  # rows of 128 or 256 are pieces of a stored row of 1024
                out.planted.append((place // ROW, place % ROW, len(ids), kind, key))
            at += len(ids) + 1  # the separator is the zero that is already there
        if at < wide:
            which = 0 if rng.chance(BOOKS_OF_PROSE) else 1
            rows[row, at:] = supply[which].take(wide - at)
            name = ("books", "docstrings")[which]
            tokens[name] = tokens.get(name, 0) + wide - at
    assert EOT == 0
    out.rows = rows.reshape(-1, ROW)
    return out


def _best_fit(sizes: list[int], wide: int = ROW) -> list[list[int]]:
    """Pack items into rows of `wide` - 1 places: each goes where the least room is left over."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, bin), sorted
    for item, size in enumerate(sizes):
        size = min(size, wide - 1)  # a document that fills its row needs no separator
        at = bisect_left(room, (size, -1))
        if at == len(room):
            bins.append([item])
            free, which = wide - 1 - size, len(bins) - 1
        else:
            free, which = room.pop(at)
            bins[which].append(item)
            free -= size
        if free > 0:
            insort(room, (free, which))
    return bins


__all__ = [
    "N_SHARDS", "N_STEPS", "PLANNED_SHARDS", "ROW", "ROWS_PER_STEP", "SHARES", "STEPS_PER_SHARD", "Prose",
    "Shard", "WARM_SHARDS", "CHUNKS_PER_SHARD", "build_shard", "width", "withheld", "world_documents",
]  # fmt: skip
