"""Plausible but wrong StreamingLLM caches that `check_streaming_llm` must reject."""

from refimpl.kvcache import KVCache, StreamingLLM


class _Original(StreamingLLM):
    """Sinks and window, but keys keep their places in the text."""

    positions = "original"


class _NoSinks(StreamingLLM):
    """A compact window of the same size."""

    def keep(self, v):
        size = self.sink + self.recent
        return None if v.S <= size else [slice(v.S - size, v.S)]


class _SinksSlide(StreamingLLM):
    """While it generates, the oldest token goes, be it a sink."""

    def replace(self, v):
        return v.oldest()


class _AbsoluteQuery(KVCache):
    """Keys of the window at compact positions, the query at its own: the trap of the old SinkCache."""

    def __init__(self, model, policy):
        super().__init__(model, policy)
        for layer in self.layers:
            layer.rope.shift = lambda t, steps: t


def _check(model, recent, sink):
    KVCache(model, StreamingLLM(recent, sink))
    return StreamingLLM(recent, sink)


def original(model, recent, sink=4):
    _check(model, recent, sink)
    return KVCache(model, _Original(recent, sink))


def no_sinks(model, recent, sink=4):
    _check(model, recent, sink)
    return KVCache(model, _NoSinks(recent, sink))


def sinks_slide(model, recent, sink=4):
    _check(model, recent, sink)
    return KVCache(model, _SinksSlide(recent, sink))


def absolute_query(model, recent, sink=4):
    return _AbsoluteQuery(model, _check(model, recent, sink))


MUTANTS = [
    ("streaming_llm", "keys keep their places in the text", original),
    ("streaming_llm", "a window without sinks", no_sinks),
    ("streaming_llm", "sinks go when the window slides", sinks_slide),
    ("streaming_llm", "the newest token at its absolute position", absolute_query),
]
