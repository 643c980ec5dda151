"""Plausible but wrong full caches that `check_full_cache` must reject."""

from refimpl.kvcache import Full, KVCache, StreamingLLM, Window


class KeepsTwenty(KVCache):
    """Evicts, unnoticed while texts are short."""

    def __init__(self, model):
        super().__init__(model, Window(20))


class CountsQueryHeads(KVCache):
    """Bytes of keys and values as the repeated ones of grouped attention would have."""

    def __init__(self, model):
        super().__init__(model, Full())
        self.repeats = model.config.num_attention_heads // self._G

    def nbytes(self):
        return {tier: size * self.repeats for tier, size in super().nbytes().items()}


class CountsSlots(KVCache):
    """Renumbers what it keeps: the same while nothing is evicted, and then not."""

    def __init__(self, model):
        rotary = model.config.model_type != "gpt2"
        super().__init__(model, StreamingLLM(16, 4) if rotary else Window(20))


MUTANTS = [
    ("full_cache", "evicts beyond twenty tokens", KeepsTwenty),
    ("full_cache", "bytes of repeated keys and values", CountsQueryHeads),
    ("full_cache", "sinks and a window of together twenty", CountsSlots),
]
