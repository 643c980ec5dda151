"""T6: the same tokens stay and the same logits follow as in kvpress, whose arrays lie in golden/kvpress.npz.

`data/kvcache_golden.py` makes them in an environment of its own; model and tokens are drawn by numpy there as
here. Two of its presses have no file of their own in refimpl: they are the first two policies below.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.kvcache import KVCache, KVPolicy, StreamingLLM, best
from refimpl.kvcache.pyramidkv import PyramidKV
from refimpl.kvcache.snapkv import AdaSnapKV, SnapKV
from refimpl.kvcache.tova import TOVA

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "kvcache_golden.py"
spec = importlib.util.spec_from_file_location("kvcache_golden", SCRIPT)
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)
N, WINDOW, KERNEL, SINK = golden.KEPT, golden.WINDOW, golden.KERNEL, golden.SINK


class Knorm(KVPolicy):
    """The keys with the smallest norm stay (2406.11430), of the prompt or, with `always`, at every step."""

    def __init__(self, always=False):
        self.always = always

    def keep(self, v):
        wanted = v.S > N and v.prefill != self.always
        return best(-v.k.norm(dim=-1), N) if wanted else None


class ObservedAttention(KVPolicy):
    """The mean weight that a key gets from the queries that see it."""

    needs = {"attn"}

    def keep(self, v):
        return best(v.attn_sum().mean(2) / (v.S - v.rank), N) if v.prefill else None


class Prompt(StreamingLLM):
    """Evict once, after the prompt."""

    def keep(self, v):
        return super().keep(v) if v.prefill else None


class InPlace(Prompt):
    positions, stretches = "original", False


class PeersPyramid(PyramidKV):
    """kvpress counts the window inside the budgets, the authors' code on top."""

    def capacity_of(self, v):
        return super().capacity_of(v) - self.window


class Newest(TOVA):
    """TOVA with the newest token forced, after the prompt only or after every later token only."""

    def __init__(self, budget, prompt):
        super().__init__(budget, newest=True)
        self.prompt = prompt

    def keep(self, v):
        return super().keep(v) if v.prefill == self.prompt else None


OURS = {
    "SnapKV": lambda: SnapKV(N, WINDOW, KERNEL),
    "PyramidKV": lambda: PeersPyramid(golden.PROMPT // 2 + WINDOW, WINDOW, KERNEL, beta=golden.BETA),
    "StreamingLLM": lambda: InPlace(N - SINK, SINK),
    "KeyRerotation(StreamingLLM)": lambda: Prompt(N - SINK, SINK),
    "Knorm": Knorm,
    "ObservedAttention": ObservedAttention,
    "TOVA": lambda: Newest(N, prompt=True),
    "AdaKV(SnapKV)": lambda: AdaSnapKV(N, WINDOW, KERNEL, floor=0.2),
    "Decoding(Knorm)": lambda: Knorm(always=True),
    "Decoding(TOVA)": lambda: Newest(N, prompt=False),
}


@pytest.fixture(scope="module")
def arrays():
    with np.load(golden.OUT) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def llama():
    return golden.model()


def test_the_golden_file_was_made_of_this_model(arrays):
    about = json.loads(str(arrays["about"]))
    assert about["input"] == golden.fingerprint()
    assert about["peers"]["kvpress"] == "0.5.5" and golden.OUT.stat().st_size < 2**18


@torch.no_grad()
@pytest.mark.parametrize("case", golden.CASES)
def test_kvpress(case, arrays, llama):
    ids, cache = golden.tokens(), KVCache(llama, OURS[case]())
    start = N if case.startswith("KeyRerotation") else golden.PROMPT
    logits = [llama(ids[:, : golden.PROMPT], past_key_values=cache).logits[0, -1]]
    decoding = case.startswith("Decoding")
    values = None if decoding else stored_values(cache)
    logits += golden.decode(llama, cache, ids, start)
    if decoding:
        values = stored_values(cache)
    expected = torch.from_numpy(arrays[f"{case}/logits"])
    assert (torch.stack(logits) - expected).abs().max() <= 2e-5
    for layer, heads in enumerate(values):
        flat, counts = (torch.from_numpy(arrays[f"{case}/{what}/{layer}"]) for what in ("values", "counts"))
        assert [len(head) for head in heads] == counts.tolist()
        for ours, theirs in zip(heads, flat.split(counts.tolist()), strict=True):
            apart = (ours[:, None] - theirs).abs().amax(-1)  # theirs come in the order of their scores
            assert apart.amin(0).max() <= 2e-5 and apart.amin(1).max() <= 2e-5


def stored_values(cache):
    """Kept values by layer and head."""
    out = []
    for l, layer in enumerate(cache.layers):
        counts = cache.held(l)[0].tolist()
        out.append(layer.codec.v.reshape(-1, 8).split(counts))
    return out
