"""The check of the full cache (kv-cache spec 1): exact, and of the bytes that its formula says."""

from collections.abc import Callable

import torch

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import HEADS, LAYERS, random_ids, tiny

IMPLEMENTATION = {"full_cache": "refimpl.kvcache.cache:KVCache"}


@check
def check_full_cache(KVCache: Callable) -> None:
    """`KVCache(model)` serves as `past_key_values`; `nbytes()`, `read_bytes()`, `get_seq_length()`."""
    for family, G, D in (("llama", 2, 8), ("gpt2", HEADS, 8), ("mistral", 2, 16)):
        ids, plain, model = random_ids(2, 30), tiny(family), tiny(family)
        with torch.no_grad():
            expected = plain(ids, use_cache=False).logits
            cache, out = KVCache(model), []
            for start, stop in ((0, 12), (12, 17), *((t, t + 1) for t in range(17, 30))):
                out.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
                n = 2 * 2 * LAYERS * G * stop * D * 4
                held, read = cache.nbytes()["payload"], cache.read_bytes()["payload"]
                formula = f"2 · L · G · n · D · 4 bytes of 2 rows are {n}"
                require(held == n, f"{family}, {stop} tokens: {held} bytes held; {formula}")
                require(read == n, f"{family}, {stop} tokens: the attention read {read} bytes of {n}")
                seen = cache.get_seq_length()
                require(seen == stop, f"{family}: {seen} tokens seen, {stop} were fed")
        require_close(torch.cat(out, 1), expected, 1e-5, f"{family}: logits with the cache, against without")
