"""Cross-check of the 8-bit AdamW with bitsandbytes and torchao: writes data/results/footprint/peers.json.

Run `python data/footprint_peers.py` in an environment that has refimpl's packages and one of the peers, or
both: `pip install bitsandbytes==0.50.2 torchao==0.18.0`. Takes minutes; exit code 1 if a peer disagrees.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.footprint.adam8bit import AdamW8bit
from refimpl.footprint.blockwise import dequantise_blockwise, dynamic_map, quantise_blockwise
from refimpl.ledger import of_tensors
from refimpl.results import store

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "data" / "results" / "footprint" / "peers.json"
SOURCES = ("data/footprint_peers.py", "refimpl/footprint/adam8bit.py", "refimpl/footprint/blockwise.py")
PEERS = ("bitsandbytes", "torchao")
SEEDS, STEPS = (0, 1, 2), 300


def main() -> int:
    """Compare, print, store."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    present = [name for name in PEERS if importlib.util.find_spec(name)]
    if not present:
        print(f"neither of {', '.join(PEERS)} is installed")
        return 1
    measured: dict[str, Any] = {}
    makers: dict[str, Callable] = {"AdamW": torch.optim.AdamW, "refimpl AdamW8bit": AdamW8bit}
    if "bitsandbytes" in present:
        import bitsandbytes

        measured["maps"] = {kind: same_numbers(kind == "signed") for kind in ("signed", "unsigned")}
        show("maps", measured["maps"])
        makers["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit
    if "torchao" in present:
        import torchao.optim

        makers["torchao AdamW8bit"] = torchao.optim.AdamW8bit
        makers["torchao AdamW4bit"] = torchao.optim.AdamW4bit
    makers["linear int8, no blocks"] = lambda p, **kw: AdamW8bit(p, map="linear", block=None, **kw)

    for what, measure in (("bytes", state_size), ("way", way), ("final_loss", final_losses)):
        measured[what] = {name: measure(make) for name, make in makers.items()}
        show(what, measured[what])
    full = measured["final_loss"]["AdamW"]
    ratios = {
        name: [loss / base - 1 for loss, base in zip(losses, full, strict=True)]
        for name, losses in measured["final_loss"].items()
    }
    maps = measured.get("maps", {}).values()
    agreed = all(numbers["decoded"] <= 1e-6 and numbers["map"] <= 1e-6 for numbers in maps)
    agreed &= all(abs(r) < 0.01 for r in ratios["refimpl AdamW8bit"])
    worst = max(abs(r) for r in ratios["refimpl AdamW8bit"])
    summary = (
        f"8-bit AdamW {'agrees' if agreed else 'DISAGREES'} with {' and '.join(present)}; "
        f"final loss within {worst:.2%} of AdamW's"
    )
    print(summary)
    # JSON knows no infinity: a run that diverged has no final loss.
    measured["final_loss"] = {
        name: [loss if math.isfinite(loss) else None for loss in losses]
        for name, losses in measured["final_loss"].items()
    }
    peers = {name: importlib.metadata.version(name) for name in present}
    store(
        OUT, command="python data/footprint_peers.py", summary=summary, sources=SOURCES, root=ROOT,
        peers=peers, seeds=list(SEEDS), steps=STEPS, **measured,
    )  # fmt: skip
    return 0 if agreed else 1


def show(what: str, numbers: dict[str, Any]) -> None:
    """Print one group of results."""
    print(what, *(f"  {key}: {value}" for key, value in numbers.items()), sep="\n", flush=True)


def same_numbers(signed: bool, n: int = 100_000) -> dict[str, float]:
    """Largest differences of map and decoding, shares of other codes; errors in units of a block's absmax."""
    import bitsandbytes.functional as peer

    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=rng) * torch.randn(n, generator=rng).exp()
    x = x if signed else x.square()
    table, theirs = dynamic_map(signed), peer.create_dynamic_map(signed=signed)
    codes, absmax = quantise_blockwise(x, table)
    their_codes, their_state = peer.quantize_blockwise(x, code=theirs, blocksize=256)
    scale = absmax.repeat_interleave(256)[:n]
    decoded = dequantise_blockwise(codes, absmax, table)
    their_decoded = peer.dequantize_blockwise(codes, absmax=absmax, code=theirs, blocksize=256)
    off = [((dequantise_blockwise(c, absmax, table) - x).abs() / scale) for c in (codes, their_codes)]
    return {
        "map": (table - theirs).abs().max().item(),
        "absmax": (absmax - their_state.absmax).abs().max().item(),
        "decoded": ((decoded - their_decoded).abs() / scale).max().item(),
        "other codes, share": (codes != their_codes).double().mean().item(),
        "their code nearer, largest gain": (off[0] - off[1]).max().item(),
        "our code nearer, largest gain": (off[1] - off[0]).max().item(),
    }


def state_size(make: Callable) -> dict[str, float]:
    """Bytes of the states of a linear layer of 1024 x 1024 with bias, and per parameter; without scalars."""
    layer = nn.Linear(1024, 1024)
    optimizer = make(layer.parameters(), lr=1e-3)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [
        (f"{i}.{name}", value)
        for i, p in enumerate(layer.parameters())
        for name, value in optimizer.state[p].items()
        if isinstance(value, Tensor) and value.dim()
    ]
    total = of_tensors(tensors, "optim").total()
    if isinstance(optimizer, AdamW8bit):
        total = optimizer.ledger().total()
    return {"bytes": total, "per parameter": round(total / sum(p.numel() for p in layer.parameters()), 4)}


def way(make: Callable, steps: int = 50) -> float:
    """How far 50 steps on drawn gradients end from where AdamW ends, as a share of AdamW's way."""
    ends = []
    for one in (torch.optim.AdamW, make):
        rng = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.zeros(128, 128))
        optimizer = one([p], lr=1e-3, weight_decay=0.01)
        centre = torch.randn(p.shape, generator=rng) / 3
        for _ in range(steps):
            p.grad = centre + torch.randn(p.shape, generator=rng)
            optimizer.step()
        ends.append(p.detach())
    return ((ends[1] - ends[0]).norm() / ends[0].norm()).item()


def final_losses(make: Callable) -> list[float]:
    """One per seed."""
    return [trained(make, seed) for seed in SEEDS]


def trained(make: Callable, seed: int) -> float:
    """Mean loss of the last 50 of 300 steps: tokens of a random chain; inf if it diverges."""
    rng = torch.Generator().manual_seed(seed)
    vocab, batch = 128, 32
    chain = torch.softmax(2 * torch.randn(vocab, vocab, generator=rng), dim=-1)
    ids = torch.randint(vocab, (STEPS * batch, 1), generator=rng)
    for _ in range(2):
        ids = torch.cat([ids, torch.multinomial(chain[ids[:, -1]], 1, generator=rng)], dim=1)
    shapes = (vocab, 64), (128, 128), (vocab, 128)
    weights = [nn.Parameter(torch.randn(s, generator=rng) / s[1] ** 0.5) for s in shapes]
    embed, up, out = weights
    optimizer = make(weights, lr=3e-3, weight_decay=0.01)
    losses = []
    for rows in ids.split(batch):
        x = F.gelu(F.linear(embed[rows[:, :2]].flatten(1), up))
        loss = F.cross_entropy(F.linear(x, out), rows[:, 2])
        if not loss < 100:
            return float("inf")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


if __name__ == "__main__":
    sys.exit(main())
