"""Print how fast each format is generated, and the training mix as a whole (bar: 2 MB/s per process).

    OMP_NUM_THREADS=1 python tools/world_speed.py [--seconds 0.3]

Not a test: a busy machine gives other numbers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from refimpl.world.formats import BY_NAME  # noqa: E402
from refimpl.world.mix import SHARES  # noqa: E402
from refimpl.world.rng import Rng  # noqa: E402

PEOPLE_SHARE = 5.0  # per cent of tokens, by an explicit schedule beside SHARES


def speed(name: str, seconds: float) -> float:
    """MB of text per second of one format, sampled and rendered; the first document only fills caches."""
    form, rng, n = BY_NAME[name], Rng("speed", name), 0
    form.document(rng)
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        for _ in range(10):
            n += len(form.document(rng).encode())
    return n / 1e6 / spent


def main() -> None:
    """Measure every format and the mix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="measured per format")
    args = parser.parse_args()
    shares = {**SHARES, "known_people": PEOPLE_SHARE}
    rates = {name: speed(name, args.seconds) for name in BY_NAME}
    for name, rate in sorted(rates.items(), key=lambda row: row[1]):
        print(f"{name:24} {shares[name]:5.2f} %  {rate:6.2f} MB/s")
    # shares are of tokens; bytes per token differ little between formats, so they serve as shares of bytes
    mix = sum(shares.values()) / sum(share / rates[name] for name, share in shares.items())
    print(f"{'the training mix':24} {sum(shares.values()):5.2f} %  {mix:6.2f} MB/s")


if __name__ == "__main__":
    main()
