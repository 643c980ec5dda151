"""Plausible but wrong LaCache that its check must reject."""

from refimpl.kvcache.lacache import LaCache


class Streaming(LaCache):
    """Switched off: sinks and the last tokens."""

    def keep(self, v):
        return None if v.S <= self.limit else (v.rank < self.sink) | (v.rank >= v.S - self.limit + self.sink)


class NoLadder(LaCache):
    """All layers thin alike: strided eviction."""

    def offset(self, layer):
        return 0


class OtherLadder(LaCache):
    def __init__(self, budget, n_layers, span, overlap=0, ladder="interleaved", sink=4):
        other = "contiguous" if ladder == "interleaved" else "interleaved"
        super().__init__(budget, n_layers, span, overlap, other, sink)


class CursorStandsStill(LaCache):
    """Every round starts at the sinks, so that the oldest tokens are thinned at every turn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = 1


class BeforeTheStep(LaCache):
    """One token too early: compaction at the limit, not above it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.limit -= 1


class NewestThinned(LaCache):
    """The cursor runs into the newest tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = (self.limit - self.sink) // self.kept


class SamePlaceInEveryLayer(LaCache):
    """While it generates, all layers drop the first of a block."""

    def replace(self, v):
        start, _ = self._thin(v, v.seen - 1 - self.limit)
        return (v.rank == start).long().argmax(-1)


MUTANTS = [
    ("lacache", "a window with sinks", Streaming),
    ("lacache", "all layers keep the same places", NoLadder),
    ("lacache", "the two ladders are exchanged", OtherLadder),
    ("lacache", "the cursor never moves on", CursorStandsStill),
    ("lacache", "compaction comes one token early", BeforeTheStep),
    ("lacache", "the newest tokens are thinned too", NewestThinned),
    ("lacache", "all layers drop the same places in decoding", SamePlaceInEveryLayer),
]
