"""Plausible but wrong FastGen that its check must reject."""

import torch

from refimpl.kvcache import fastgen
from refimpl.kvcache.fastgen import FastGen


class NothingGoes(FastGen):
    """Switched off: every head is told to keep everything."""

    def observe(self, v):
        super().observe(v)
        v.notes["rule"] = torch.full_like(v.notes["rule"], 4)


class SumNotDivided(FastGen):
    """Recovery without the rows' normalisation: in units of rows, not of mass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recovery = min(self.recovery, 1.0) / 40


class LastRowOnly(FastGen):
    """The prompt's last query alone decides."""

    def observe(self, v):
        super().observe(v)
        if v.prefill:
            last = v.attn[:, :, :, -1].mean(2)
            sets = self._sets(v)
            near = v.pos >= v.seen - v.notes["local"]
            kept = [(last * s).sum(-1) for s in (*sets, sets[2] | near)]
            missed = torch.stack(kept) < self.recovery
            v.notes["rule"] = missed.long().cumprod(0).sum(0)[..., None]


class LocalDoesNotMove(FastGen):
    """Recovery counts the last columns as the local part of every row."""

    def observe(self, v):
        def fixed(view, local):
            column, _ = real(view, local)
            return column, column * (view.pos >= view.seen - local)

        real, fastgen.column_sums = fastgen.column_sums, fixed
        try:
            super().observe(v)
        finally:
            fastgen.column_sums = real


class PunctuationForgotten(FastGen):
    """What is generated is in no class."""

    def observe(self, v):
        super().observe(v)
        if not v.prefill:
            v.slot["kind"][..., -v.T :] = 0


class WindowStandsStill(FastGen):
    def keep(self, v):
        kept = super().keep(v)
        if v.prefill:
            return kept
        old = v.pos == v.seen - 1 - v.notes["local"]
        return kept | (v.notes["rule"] == 3) & old


class FrequentNumberOfThePrompt(FastGen):
    """The number of frequent tokens stays what it was at the end of the prompt."""

    def _frequent(self, v, heads):
        if v.prefill:
            v.notes["length"] = torch.full((v.shape[0], 1, 1), v.seen)
        view = {"seen": int(v.notes["length"][0]), "S": v.S, "slot": v.slot, "notes": v.notes, "ok": v.ok}
        return super()._frequent(type("View", (), view)(), heads)


MUTANTS = [
    ("fastgen", "every head keeps everything", NothingGoes),
    ("fastgen", "the mass is not divided by the number of rows", SumNotDivided),
    ("fastgen", "recovery is that of the last row", LastRowOnly),
    ("fastgen", "the local part does not move with the row", LocalDoesNotMove),
    ("fastgen", "generated punctuation is evicted", PunctuationForgotten),
    ("fastgen", "the local part does not slide while decoding", WindowStandsStill),
    ("fastgen", "the number of frequent tokens does not grow with the text", FrequentNumberOfThePrompt),
]
