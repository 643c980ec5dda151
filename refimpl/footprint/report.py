"""What `python -m refimpl footprint` prints: bytes by kind, whether they fit, and what would make them fit.

GB is 10^9 bytes and GiB 2^30; what is below 1 GB is given in MB or KB. "<0.01" is not nothing; "0" is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

from refimpl.footprint.arch import Arch
from refimpl.footprint.instants import Plan, training
from refimpl.footprint.published import Deepseek, Model
from refimpl.footprint.serving import crossover, largest_batch, serving, weight_bytes
from refimpl.footprint.sharding import MOMENTS
from refimpl.ledger import Kind, Ledger

__all__ = ["largest_rank", "serving_report", "training_report"]

MOST_GPUS = 1024  # at which the search for a number of GPUs ends
_UNITS = {"GB": (10**9, 2**30), "MB": (10**6, 2**20), "KB": (10**3, 2**10)}
_LEFT_OUT = """not included: scratch space inside one operation (a matmul's workspace, gradients within one
layer), the rounding and fragmentation of an allocator, and what the runtime itself takes"""


def training_report(arch: Arch, plan: Plan, gpu: int | None = None) -> int:
    """Print the three instants of a training step and, with a GPU, the verdict.

    Parameters: arch and plan as in `instants.training`; gpu, bytes of one GPU (None: none is named). Returns
    the exit code: 0 if it fits or no GPU is named, else 1. Raises ValueError as `instants.training`.

    >>> from refimpl.footprint.arch import Run
    >>> gpt2 = Arch.from_config({"model_type": "gpt2"})
    >>> training_report(gpt2, Plan(Run(length=256, optimizer="sgd")), gpu=2 * 10**9)  # doctest: +ELLIPSIS
    full, float32, sgd, 1 x 256 tokens, sdpa
    <BLANKLINE>
    GB at             loss  backward    update
    weight            0.50      0.50      0.50
    grad                 0      0.50      0.50
    activation        0.32      0.02         0
    temp              0.10         0         0
    total             0.92      1.02      1.00
    <BLANKLINE>
    needs 1.02 GB (0.95 GiB): fits in 2.00 GB (1.86 GiB), 982.45 MB left
    not included: ...
    0
    """
    run, instants = plan.run, training(arch, plan)
    words = [plan.train if plan.train == "full" else f"{plan.train} of rank {run.lora_rank}",
             f"{run.dtype}{' under bfloat16 autocast' * run.amp}", run.optimizer,
             f"{run.batch:,} x {run.length:,} tokens", run.attention]  # fmt: skip
    words += [f"checkpoint every {run.checkpoint_every}"] if run.checkpoint_every else []
    words += [f"ZeRO {run.zero_stage} over {run.world:,} GPUs (bytes of one)"] if run.zero_stage else []
    print(", ".join(words) + "\n")
    _table(instants)
    if plan.train != "full":
        print("\nactivations: those of full training, an upper bound")
    return _verdict(_need(instants), gpu, lambda unit: _training_ways(arch, plan, gpu, unit))


def serving_report(
    arch: Model, batch: int, length: int, dtype: str = "bfloat16", *,
    longest: int, window: int | None = None, gpu: int | None = None,
) -> int:  # fmt: skip
    """Print the peaks of prefill and decoding and, with a GPU, the verdict.

    Parameters: as in `serving.serving`, and longest, tokens of the model's context; gpu, bytes of one GPU
    (None: none is named). Returns the exit code: 0 if it fits or no GPU is named, else 1. Raises ValueError
    as `serving.serving`.

    >>> gpt2 = Arch.from_config({"model_type": "gpt2"})
    >>> serving_report(gpt2, batch=1, length=512, longest=1024)  # doctest: +ELLIPSIS
    serving in bfloat16, 1 x 512 tokens
    <BLANKLINE>
    MB at          prefill    decode
    weight          248.88    248.88
    ...
    """

    def account(tokens: int, dtype: str = dtype) -> dict[str, Ledger]:
        phases = ("prefill", "decode")
        return {phase: serving(arch, batch, tokens, dtype, phase=phase, window=window) for phase in phases}

    def ways(unit: str) -> None:
        if weight_bytes(arch, dtype) > gpu:
            print(f"\nthe weights alone, {_both(weight_bytes(arch, dtype))}, do not fit: no smaller batch or "
                  "length would help")  # fmt: skip
        else:
            most = min(largest_batch(arch, length, gpu, dtype, phase=p, window=window) for p in ledgers)
            lengths = [2**i for i in range(longest.bit_length()) if _need(account(2**i)) <= gpu]
            print(f"\nlargest batch at {length:,} tokens: {f'{most:,}' if most else 'not even 1 fits'}")
            print(f"longest power of two at batch {batch:,}: "
                  f"{f'{lengths[-1]:,} tokens' if lengths else 'not even 1 token fits'}")  # fmt: skip
        whole, weights = _need(account(length, "bfloat16")), weight_bytes(arch, "bfloat16")
        print(f"\n{f'what would help ({unit})':32}{'weights':>10}{'in all':>10}")
        for bits in (16, 8, 4) if dtype == "float32" else (8, 4):
            less = weights * bits // 16
            total = whole - weights + less
            name = f"{bits}-bit weights" + ", and all else" * (bits == 16)
            print(f"{name:32}{_in(unit, less):>10}{_in(unit, total):>10}{'  fits' * (total <= gpu)}")
        print("(the scales of 8 and 4 bits not counted)")
        print(f"more GPUs: {-(-_need(ledgers) // gpu)} at the least, if they share everything evenly")

    ledgers = account(length)
    sliding = f", window {window:,}" if window else ""
    print(f"serving in {dtype}, {batch:,} x {length:,} tokens{sliding}\n")
    _table(ledgers)
    if not window:
        print("\n" + _outweighs(arch, batch, dtype, longest))
    if window and length > window:
        print("\nthe window's attention mask is not accounted")
    if isinstance(arch, Deepseek) or getattr(arch, "experts", 1) > 1:
        print("one layer's activations are not accounted for mixtures and latent attention")
    return _verdict(_need(ledgers), gpu, ways)


def largest_rank(arch: Arch) -> int:
    """Return the highest rank of LoRA's factors on q and v: the smaller side of v.

    >>> from refimpl.footprint.published import arch
    >>> largest_rank(arch("meta-llama/Meta-Llama-3-8B"))
    1024
    """
    return min(arch.hidden, arch.kv_heads * arch.head_dim)


def _outweighs(arch: Model, batch: int, dtype: str, longest: int) -> str:
    tokens = crossover(arch, batch, dtype)
    if tokens <= longest:
        return f"the cache outweighs the weights from {tokens:,} tokens on"
    # A cache grows alike with sequences and with tokens, so the two may change places.
    batches = crossover(arch, longest, dtype)
    return (f"at batch {batch:,} the cache never outweighs the weights within the context of {longest:,} "
            f"tokens (from batch {batches:,} on it does)")  # fmt: skip


def _training_ways(arch: Arch, plan: Plan, gpu: int, unit: str) -> None:
    """Print each change alone, and together with those above it."""
    run = plan.run
    without, note = ({"zero_stage": 0, "world": 1}, ", no ZeRO") if run.zero_stage else ({}, "")
    lora = {"lora_rank": run.lora_rank or min(8, largest_rank(arch)), **without}
    states = {"optimizer": "adamw8bit", **without}
    changes: list[tuple[str, bool, str | None, dict[str, Any]]] = [
        ("sdpa attention", run.attention == "eager", None, {"attention": "sdpa"}),
        ("checkpointing every layer", run.checkpoint_every is None, None, {"checkpoint_every": 1}),
        ("batch 1", run.batch > 1, None, {"batch": 1}),
        (f"LoRA{note}", plan.train == "full", "lora", lora),
        (f"QLoRA{note}", plan.train != "qlora", "qlora", lora),
        (f"8-bit optimizer states{note}", run.optimizer == "adamw", None, states),
    ]  # fmt: skip
    print(f"\n{f'what would help ({unit})':32}{'alone':>10}{'with those above':>18}")
    together = sharable = plan
    for name, applies, train, fields in changes:
        if not applies:
            continue
        alone = Plan(replace(run, **fields), train or plan.train)
        together = Plan(replace(together.run, **fields), train or together.train)
        if not train and "optimizer" not in fields:
            sharable = together
        need, both = _need(training(arch, alone)), _need(training(arch, together))
        print(f"{name:32}{_in(unit, need):>10}{_in(unit, both):>18}{'  fits' * (both <= gpu)}")
    if plan.train == "full":
        _zero_ways(arch, plan, sharable, gpu)


def _zero_ways(arch: Arch, plan: Plan, sharable: Plan, gpu: int) -> None:
    """Print over how many GPUs ZeRO 3 fits, of the run as it is and with the changes that go with ZeRO."""
    run = plan.run
    if run.optimizer not in MOMENTS:
        print(f"ZeRO: accounted for {', '.join(MOMENTS)} only, not for {run.optimizer}")
        return
    worlds = [run.world] if run.zero_stage in (1, 2) else []
    worlds += [2**i for i in range(1, MOST_GPUS.bit_length()) if 2**i > run.world]
    if not worlds:
        print(f"ZeRO 3 over more than {run.world:,} GPUs was not tried")
        return
    bases = [(plan, "alone")]
    bases += [(sharable, "with the rows above LoRA")] if sharable != plan else []
    for base, note in bases:
        for world in worlds:
            need = _need(training(arch, Plan(replace(base.run, zero_stage=3, world=world))))
            if need <= gpu:
                break
        fits = "fits" if need <= gpu else "does not fit; more GPUs were not tried"
        print(f"ZeRO 3 over {world:,} GPUs, {note}: {_one(need)} each, {fits}")


def _table(ledgers: dict[str, Ledger]) -> None:
    """Print the bytes of each kind that has any, a column per ledger."""
    unit = _unit(_need(ledgers))
    print(f"{f'{unit} at':12}" + "".join(f"{name:>10}" for name in ledgers))
    for kind in (*get_args(Kind), None):
        sizes = [ledger.total(kind, "resident") for ledger in ledgers.values()]
        if any(sizes):
            print(f"{kind or 'total':12}" + "".join(f"{_in(unit, size):>10}" for size in sizes))


def _verdict(need: int, gpu: int | None, ways: Callable[[str], None]) -> int:
    """Print whether it fits and, if not, the ways to make it fit; return the exit code."""
    fits = gpu is None or need <= gpu
    words = f"\nneeds {_both(need)}"
    if gpu is not None:
        words += f": {'fits' if fits else 'does not fit'} in {_both(gpu)}, "
        words += f"{_one(abs(gpu - need))} {'left' if fits else 'too much'}"
    print(words)
    if not fits:
        ways(_unit(need))
        print()
    print(_LEFT_OUT)
    return 0 if fits else 1


def _need(ledgers: dict[str, Ledger]) -> int:
    return max(ledger.total(view="resident") for ledger in ledgers.values())


def _unit(size: int) -> str:
    return next((unit for unit, (decimal, _) in _UNITS.items() if size >= decimal), "KB")


def _in(unit: str, size: int) -> str:
    return _number(size / _UNITS[unit][0])


def _one(size: int) -> str:
    return f"{_in(_unit(size), size)} {_unit(size)}"


def _both(size: int) -> str:
    unit = _unit(size)
    return f"{_one(size)} ({_number(size / _UNITS[unit][1])} {unit[0]}iB)"


def _number(value: float) -> str:
    text = f"{value:,.2f}"
    return text if text != "0.00" else "<0.01" if value else "0"
