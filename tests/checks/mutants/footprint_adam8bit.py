"""Plausible but wrong 8-bit AdamWs that `check_adam8bit` must reject."""

from functools import partial

import torch

from refimpl.footprint import adam8bit
from refimpl.footprint.adam8bit import AdamW8bit
from refimpl.footprint.blockwise import decode


class SignedMapForV(AdamW8bit):
    def _tables(self, p, group):
        signed, _ = super()._tables(p, group)
        return signed, signed


class VWithTheScalesOfM(AdamW8bit):
    """v is encoded with its own absmax, but decoded with those of m."""

    def _decoded(self, p, group):
        state, moments = self.state[p], super()._decoded(p, group)
        if "v_codes" in state:
            table = self._tables(p, group)[1]
            moments[1] = decode(state["v_codes"], state["m_absmax"], table, group["block"])
        return moments


class StaleScales(AdamW8bit):
    """The absmax of the first step stays; later steps store codes only."""

    def _update(self, p, group):
        kept = {name: t.clone() for name, t in self.state[p].items() if name.endswith("absmax")}
        super()._update(p, group)
        for name, absmax in kept.items():
            self.state[p][name].copy_(absmax)


class RoundsBeforeItMoves(AdamW8bit):
    """The weights move by the rounded moments."""

    def _update(self, p, group):
        before = p.clone()
        super()._update(p, group)
        state, (beta1, beta2) = self.state[p], group["betas"]
        m, v = self._decoded(p, group)
        denominator = (v / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        p.copy_(before * (1 - group["lr"] * group["weight_decay"]))
        p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))


class ForgetsTheEmbeddings(AdamW8bit):
    def add_param_group(self, param_group):
        super().add_param_group({name: value for name, value in param_group.items() if name != "bits"})


class RoundsDown(AdamW8bit):
    """The code below, not the nearest one."""

    def _update(self, p, group):
        adam8bit.encode, nearest = partial(_encode_below, adam8bit.encode), adam8bit.encode
        try:
            super()._update(p, group)
        finally:
            adam8bit.encode = nearest


def _encode_below(encode, x, table, block):
    codes, absmax = encode(x, table, block)
    above = decode(codes, absmax, table, block) > x
    return (codes.int() - above.int()).clamp(min=0).to(torch.uint8), absmax


class NoBiasCorrection(AdamW8bit):
    def _update(self, p, group):
        state = self.state[p]
        super()._update(p, group)
        state["step"] = 10**6


class TorchsLoading(AdamW8bit):
    """States are cast to the parameter's dtype, as torch does."""

    def load_state_dict(self, state_dict):
        torch.optim.Optimizer.load_state_dict(self, state_dict)


class CodesInFloat32(AdamW8bit):
    """Rounds as it should and saves nothing."""

    def _update(self, p, group):
        super()._update(p, group)
        for name in ("m_codes", "v_codes") if "m_codes" in self.state[p] else ():
            self.state[p][name] = self.state[p][name].float()


MUTANTS = [
    ("adam8bit", "states stay in float32 (switched off)", partial(AdamW8bit, bits=32)),
    ("adam8bit", "codes are kept as float32", CodesInFloat32),
    ("adam8bit", "one absmax for the whole tensor", partial(AdamW8bit, block=None)),
    ("adam8bit", "blocks of 2048", partial(AdamW8bit, block=2048)),
    ("adam8bit", "a linear map", partial(AdamW8bit, map="linear")),
    ("adam8bit", "the signed map for v", SignedMapForV),
    ("adam8bit", "v is decoded with the block scales of m", VWithTheScalesOfM),
    ("adam8bit", "the block scales of the first step stay", StaleScales),
    ("adam8bit", "the weights move by rounded moments", RoundsBeforeItMoves),
    ("adam8bit", "rounds down instead of to the nearest", RoundsDown),
    ("adam8bit", "no bias correction after the first step", NoBiasCorrection),
    ("adam8bit", "small tensors are rounded too", partial(AdamW8bit, min_8bit=1)),
    ("adam8bit", "embeddings are rounded too", ForgetsTheEmbeddings),
    ("adam8bit", "loading casts the block scales to the parameters' dtype", TorchsLoading),
]
