"""Readers: which of the stored entries the query of a decoding step reads, and how many bytes that is.

A reader serves forwards of one new token. The prompt, and a later forward of several tokens, read everything.
"""

from __future__ import annotations

from copy import copy
from typing import ClassVar

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.attention import Attention
from refimpl.kvcache.codecs import Codec, Dense

__all__ = ["ReadAll", "Reader", "union"]


class Reader:
    """Which entries one layer's queries read; the cache gives every layer a reader of its own by `fresh`.

    A method overrides `build` and `append` (its index), and `select`; or, where it does not simply attend to
    what it selects, `read` and `read_bytes`.

    Class attributes
    - codec: the class of codec that it reads from.
    - evicts: whether a policy may evict beside it; if not, only `Full` is allowed.
    - padded: whether rows of a batch may be padded on the left.
    - queries: whether `build` wants all queries of the prompt, also of a prompt fed in chunks.
    """

    codec: ClassVar[type[Codec]] = Dense
    evicts: ClassVar[bool] = True
    padded: ClassVar[bool] = True
    queries: ClassVar[bool] = False

    def fresh(self) -> Reader:
        """A reader with the same settings and no index."""
        return copy(self)

    def check(self, head_dim: int) -> None:
        """Raise ValueError for settings that do not fit the model's head dim; called when a cache is made."""

    def build(self, codec: Codec, q: Tensor, ok: Tensor | None) -> None:
        """Index what the codec holds: at the end of prefill, and again whenever a policy has evicted.

        q [B, G, R, T, D] are the queries of that forward; ok [B, G, S] is False at padding (None: there is
        none).
        """

    def append(self, k: Tensor) -> None:
        """Take note of new keys [B, G, T, D] behind the indexed ones, before they are read."""

    def select(self, q: Tensor) -> LongTensor:
        """Return the slots that q [B, G, R, 1, D] reads, -1 for none.

        [B, G, m]: the R query heads of a KV head read the same; [B, G, R, m]: each reads its own.
        """
        raise NotImplementedError

    def read(self, q: Tensor, codec: Codec, scale: float, ok: Tensor | None) -> Tensor:
        """Attend with q [B, G, R, 1, D] to what is selected, and return the output, of q's shape."""
        index = self.select(q)
        k, v = codec.read(index.clamp(min=0).flatten(2))
        real = index >= 0
        if ok is not None:
            real &= ok.gather(-1, index.clamp(min=0).flatten(2)).view(index.shape)
        self._last = index.masked_fill(~real, -1), codec.k.shape[2], _row_bytes(k, v)
        if index.ndim == 3:
            return Attention(q, k, v, scale, None, None, real).output()
        B, G, R, m = index.shape  # every query head is a KV head of its own
        k, v = (t.view(B, G * R, m, t.shape[-1]) for t in (k, v))
        own = Attention(q.flatten(1, 2)[:, :, None], k, v, scale, None, None, real.flatten(1, 2))
        return own.output().view(q.shape)

    def read_bytes(self) -> dict[str, int]:
        """Return the bytes of the last `read`, by where they came from (see `KVCache.read_bytes`).

        An entry that several query heads of one KV head read is counted once.
        """
        index, S, row = self._last
        return {"payload": int(union(index, S).sum()) * row, "meta": 0, "host": 0, "moved": 0}

    def take_rows(self, rows: LongTensor) -> None:
        """Reorder or repeat the rows of the batch in the index: what beam search needs."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the index holds, by name."""
        return {}


class ReadAll(Reader):
    """Every query reads every stored entry: plain attention, over any codec.

    >>> ReadAll().tensors()
    {}
    """

    codec = Codec


def union(index: LongTensor, S: int) -> Tensor:
    """Return which of S slots are selected by any query head: index [B, G, ...], -1 for none, to [B, G, S].

    >>> union(torch.tensor([[[[0, 2], [2, -1]]]]), 4).tolist()
    [[[True, False, True, False]]]
    """
    mask = torch.zeros(*index.shape[:2], S + 1, dtype=torch.bool, device=index.device)
    return mask.scatter_(-1, index.flatten(2) + 1, True)[..., 1:]


def _row_bytes(k: Tensor, v: Tensor) -> int:
    return k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
