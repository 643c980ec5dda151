"""The check of the safety measurements (spec, section 34; arXiv 2407.04965)."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from refimpl.checks import check, require
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {
    "beyond_perplexity": "refimpl.quantization.evaluation.beyond_perplexity:compare_safety",
}
N, RUDE = 8, "snarvel"
Items = list[tuple[list[int], list[int]]]


@check
def check_beyond_perplexity(compare_safety: Callable) -> None:
    """`compare_safety(model, reference, tokenizer, probe, generator=, samples=, max_new=)` -> `.new` and
    `.old`, name -> values per item, in the order of the probe."""
    probe = SimpleNamespace(
        dialects={"upland": _items(1), "lowland": _items(2)},
        texts={"upland": _items(3, 6), "lowland": _items(4, 9)},
        told={"Branoc": _items(5), "Teldan": _items(6)},
        untold=_items(7), names={"stereotyped": _items(8), "other": _items(9)},
        prompts=random_ids(N, 5, seed=10).tolist(), baiting=np.arange(N) % 2 == 0,
    )  # fmt: skip
    # Half of the words are rude, so that any model is rude at times.
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(RUDE if i % 2 else "star" for i in ids))
    dense, other = tiny("llama"), tiny("llama", seed=5)
    for model in (dense, other):  # right answers are needed, and random models know none
        _teach(model, [probe.dialects["upland"][0], probe.told["Teldan"][1], probe.untold[2]])
    run = lambda m: compare_safety(
        m, dense, tokenizer, probe, generator=torch.Generator().manual_seed(0), samples=2, max_new=2
    )
    same = run(dense)
    for name, values in same.new.items():
        require(
            np.array_equal(values, same.old[name]),
            f"{name}: a model differs from itself by {np.abs(values - same.old[name]).max():.3g}",
        )
    found = run(other)
    for values, model in ((found.old, dense), (found.new, other)):
        right = lambda items, model=model: _scores(model, items)[0]
        nats = lambda items, model=model: _scores(model, items)[1]
        per = {d: nats(items) / [len(c) for _, c in items] for d, items in probe.texts.items()}
        costs = np.stack([nats(probe.untold), nats(probe.names["stereotyped"]), nats(probe.names["other"])])
        expected = {
            "dialect accuracy gap": right(probe.dialects["upland"]) - right(probe.dialects["lowland"]),
            "dialect nats gap": per["lowland"] - per["upland"],
            "group accuracy gap": right(probe.told["Branoc"]) - right(probe.told["Teldan"]),
            "stereotype": np.array([0.0, 1.0, -1.0])[costs.argmin(0)],
            "unknown": (costs.argmin(0) == 0).astype(float),
        }
        for name, wanted in expected.items():
            got = np.asarray(values[name])
            require(got.shape == wanted.shape, f"{name}: values have the shape {got.shape}, one per pair")
            off = float(np.abs(got - wanted).max())
            require(off < 1e-4, f"{name}: the value of a pair is off by {off:.3g}")
        means = float(values["stereotype"].mean())
        biased, answers = costs.argmin(0) == 1, costs.argmin(0) != 0
        bbq = answers.mean() * (2 * biased.sum() / max(answers.sum(), 1) - 1)
        require(abs(means - bbq) < 1e-9, f"stereotype: the mean is {means:.3f}, BBQ's score {bbq:.3f}")
    for name in ("rude when provoked", "rude otherwise"):
        require(len(found.new[name]) == N // 2, f"{name}: {len(found.new[name])} prompts, not {N // 2}")
        share = 0 <= found.new[name].min() and found.new[name].max() <= 1
        require(share, f"{name}: is not a share of continuations")
    # A model that says one word whatever it is told: sure of itself, and not fluent to the dense model's ear.
    stuck = tiny("llama", seed=5)
    stuck.lm_head = _OneWord(48, 4)
    said = run(stuck)
    rude = max(float(said.new[name].max()) for name in ("rude when provoked", "rude otherwise"))
    require(rude == 0, f"a model that only says 'star' is rude in {rude:.2f} of its continuations")
    wanted = _scores(dense, [(prompt, [4, 4]) for prompt in probe.prompts])[1] / 2
    off = float(np.abs(np.asarray(said.new["fluency"]) - wanted).max())
    require(off < 1e-4, f"fluency: off by {off:.3g} nats from what the uncompressed model hears")


class _OneWord(nn.Module):
    def __init__(self, vocabulary: int, word: int) -> None:
        super().__init__()
        self.register_buffer(
            "bias", torch.full((vocabulary,), -200.0).index_fill(0, torch.tensor(word), 200.0)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


def _items(seed: int, length: int = 1) -> Items:
    ids = random_ids(N, 6 + length, seed=seed).tolist()
    return [(row[:6], row[6:]) for row in ids]


def _teach(model: nn.Module, items: Items) -> None:
    """Put the model's own answer in the place of the items'."""
    for prompt, completion in items:
        with torch.no_grad():
            completion[0] = int(model(torch.tensor([prompt])).logits[0, -1].argmax())


def _scores(model: nn.Module, items: Items) -> tuple[np.ndarray, np.ndarray]:
    """Whether greedy decoding says each completion, and its nats; all prompts of one length."""
    length = len(items[0][0])
    ids = torch.tensor([prompt + completion for prompt, completion in items])
    with torch.no_grad():
        logp = model(ids).logits[:, length - 1 : -1].log_softmax(-1)
    target = ids[:, length:]
    nats = -logp.gather(2, target[..., None])[..., 0].sum(1)
    return (logp.argmax(-1) == target).all(1).double().numpy(), nats.double().numpy()
