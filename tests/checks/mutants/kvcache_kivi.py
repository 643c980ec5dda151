"""Plausible but wrong KIVI and MiniKV that their checks must reject."""

import torch

from refimpl.kvcache import kivi
from refimpl.kvcache.kivi import KIVI, dequantise, quantise
from refimpl.kvcache.minikv import PrefillH2O, PromptKIVI
from refimpl.kvcache.slots import best


class Off(KIVI):
    """Nothing is ever quantised."""

    def commit(self, ok):
        pass


class KeysPerToken(KIVI):
    """What transformers' QuantizedCache does by default: groups of channels for keys as well."""

    def commit(self, ok):
        keys, values = self.due(*(0 if t is None else t.shape[2] for t in (self.k, self.v)))
        if self.bits == 16:
            return
        if keys:
            front, self.k = kivi._split(self.k, keys, ok)
            self.keys = kivi._append(self.keys, quantise(front, self.bits, self.group, -1))
        if values:
            front, self.v = kivi._split(self.v, values, ok)
            self.values = kivi._append(self.values, quantise(front, self.bits, self.group, -1))


class QuantisedAnew(KIVI):
    """Whenever something is added, everything is decoded and quantised again, keys in shifted groups."""

    def commit(self, ok):
        old = self.keys
        super().commit(ok)
        if old is not None and self.keys is not old:
            again = dequantise(self.keys).flip(2)
            self.keys = quantise(again * 0.999, self.bits, self.group, -2)
            self.keys = quantise(dequantise(self.keys).flip(2), self.bits, self.group, -2)


class OneCodePerByte(KIVI):
    def compressed(self):
        named = super().compressed()
        wide = {name: t.repeat_interleave(8 // self.bits, -1) for name, t in named["payload"].items()}
        return named | {"payload": wide}


class ValuesFlushed(KIVI):
    """The values' window is emptied as a block, as the keys' is."""

    def due(self, keys, values):
        return keys - keys % self.residual, values - values % self.residual


class SeesItsOwnRounding(KIVI):
    """The forward that brings the tokens already reads them quantised."""

    def append(self, k, v):
        super().append(k, v)
        self.commit(None)


class WaitsAsKIVI(PromptKIVI):
    due = KIVI.due


class NoWaiting(PromptKIVI):
    """Every full group is quantised at once, in decoding too."""

    def due(self, keys, values):
        return keys - keys % self.group, values - values % self.group


class RecentOnly(PrefillH2O):
    def keep(self, v):
        keep = super().keep(v)
        return None if keep is None else torch.arange(v.S - keep.shape[-1], v.S).expand_as(keep)


class UniformBudget(PrefillH2O):
    def __init__(self, heavy, recent, *, depth=7.0):
        super().__init__(heavy, recent, depth=1)


class PyramidOnBoth(PrefillH2O):
    """The recent tokens follow the pyramid as well."""

    def keep(self, v):
        if not v.prefill:
            return None
        last = 1 / self.depth
        share = 2 - last + (2 * last - 2) * v.layer / (v.n_layers - 1)
        heavy, recent = int(self.heavy * share * v.S), int(self.recent * share * v.S)
        score = v.attn_sum().sum(2)
        score[..., v.S - recent :] = torch.inf
        return best(score, min(v.S, heavy + recent))


MUTANTS = [
    ("kivi", "nothing is quantised", Off),
    ("kivi", "keys are grouped per token", KeysPerToken),
    ("kivi", "everything is quantised again with every block", QuantisedAnew),
    ("kivi", "one code per byte", OneCodePerByte),
    ("kivi", "values leave their window as a block", ValuesFlushed),
    ("kivi", "the prompt's attention sees quantised keys", SeesItsOwnRounding),
    ("minikv_codec", "KIVI's rules for what waits", WaitsAsKIVI),
    ("minikv_codec", "new tokens do not wait for the residual", NoWaiting),
    ("minikv_policy", "no heavy hitters, only recent tokens", RecentOnly),
    ("minikv_policy", "every layer keeps the same share", UniformBudget),
    ("minikv_policy", "recent tokens follow the pyramid too", PyramidOnBoth),
]
