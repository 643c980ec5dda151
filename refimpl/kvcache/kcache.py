"""KCache (2404.18057): keys stay on the device, values move to the host and come back for the best slots."""

from __future__ import annotations

from torch import Tensor

from refimpl.kvcache.attention import Attention
from refimpl.kvcache.codecs import Codec
from refimpl.kvcache.policies import _size
from refimpl.kvcache.readers import Reader
from refimpl.kvcache.tiers import HostValues

__all__ = ["KCache"]


class KCache(Reader):
    """Read all keys, and the values of the N slots with the largest weights (2404.18057; survey [30]).

    o = sum over the top N of alpha_i v_i, alpha being the softmax over all S slots. With A the mass of these
    N, the error is at most (1 - A) · max |v_i|. `renormalise` divides by A: then the error is at most
    2 (1 - A) · max |v_i|. It goes with the codec `HostValues`; nothing is evicted, and the keys' half of the
    cache stays on the device.

    Parameters: n >= 1, slots of each query head (the paper: 32 to 128); renormalise, False in this book's
    tables. Raises ValueError for another n.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model, ids = tiny("llama"), random_ids(1, 10)
    >>> cache = KVCache(model, codec=HostValues(), reader=KCache(2))
    >>> out = model(ids[:, :9], past_key_values=cache), model(ids[:, 9:], past_key_values=cache)
    >>> cache.nbytes()["payload"] == cache.nbytes()["host"] == 3 * 2 * 10 * 8 * 4
    True
    """

    codec = HostValues

    def __init__(self, n: int, renormalise: bool = False) -> None:
        self.n, self.renormalise = _size("n", n, 1), renormalise

    def read(self, q: Tensor, codec: Codec, scale: float, ok: Tensor | None) -> Tensor:
        weights = Attention(q, codec.k, None, scale, None, None, ok).weights()[:, :, :, 0]
        alpha, index = weights.topk(min(self.n, weights.shape[-1]), sorted=False)  # [B, G, R, n]
        if self.renormalise:
            alpha = alpha / alpha.sum(-1, keepdim=True)
        v, moved = codec.v.fetch(index, ok)
        if ok is not None:  # a row with fewer tokens than n: the rest has weight 0 and no value
            v = v.masked_fill((alpha == 0)[..., None], 0)
        self._bytes = {"payload": codec.k.nbytes, "meta": 0, "host": moved, "moved": moved}
        return alpha[..., None, :] @ v

    def read_bytes(self) -> dict[str, int]:
        return self._bytes
