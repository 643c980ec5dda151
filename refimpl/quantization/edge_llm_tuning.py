"""EDGE-LLM, adaptive layer tuning and voting: train a few blocks at a time, and let early exits vote.

Implements arXiv 2406.15758, the sections on adaptive layer tuning and voting, and the authors' code. Exits
stand behind every `stride` blocks, each with a copy of the output head. At a step with exit e only the LoRA
factors of its window, the `stride` blocks up to e, and its head are trained: the blocks below run without
factors and without a graph, those above not at all, so that autograd keeps the activations of `stride` blocks
instead of all. The steps are split evenly over the exits, from shallow to deep. With stride = L this is plain
LoRA tuning of the whole model.

At inference one pass without factors runs through the model; behind each exit a second stream with factors
starts from it anew. The vote is the largest probability that any exit gives each token, renormalised.

Slips of the code that are not copied:
- exits skip the final norm, except that the last is trained without it and evaluated behind it; here every
  exit reads the final norm;
- the evaluation path computes act(gate * up) for the MLP instead of act(gate) * up;
- a training step runs the blocks above the exit as well, and marks all floating-point weights of the window
  as trainable, not only the factors;
- exits stand at multiples of the stride and what is left over is never trained (here: an error).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.lora import add_lora, without_lora

__all__ = ["EarlyExits", "Tuned", "schedule", "tune", "vote"]


class EarlyExits(nn.Module):
    """A model with LoRA factors in all linear layers of its blocks, and exits behind every `stride` blocks.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, compressed or not, without LoRA; it is changed in place
        (frozen, factors added), and computes what it did as long as the factors are untrained.
    stride : blocks of a window, a divisor of their number L (the code: 8 of 32).
    rank, alpha : of the factors, as for `add_lora` (the code: 8, 16).
    generator : draws the factors.

    Its state dict has the model's tensors, the factors among them, and the heads. Raises as `add_lora`, and
    ValueError for another stride, before the model is changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> exits = EarlyExits(tiny("llama"), 1, rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    >>> [list(logits.shape) for logits in exits(random_ids(2, 5))]
    [[2, 5, 48], [2, 5, 48], [2, 5, 48]]
    """

    def __init__(
        self, model: nn.Module, stride: int, *, rank: int = 8, alpha: float = 16, generator: torch.Generator
    ) -> None:
        super().__init__()
        bb = Backbone(model)
        if type(stride) is not int or stride < 1 or bb.n_layers % stride:
            raise ValueError(f"stride must be a divisor of the {bb.n_layers} blocks, got {stride!r}")
        names = tuple(dict.fromkeys(ref.name for ref in bb.linears()))
        head = model.get_output_embeddings().weight.detach()
        add_lora(model, names, rank, alpha, generator)
        self.model, self.stride, self.n_exits = model, stride, bb.n_layers // stride
        heads = [
            nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta") for _ in range(self.n_exits)
        ]
        for exit_head in heads:
            exit_head.weight = nn.Parameter(head.clone())
        self.heads = nn.ModuleList(heads)

    def window(self, e: int) -> range:
        """The blocks that exit e (0 .. n_exits - 1) trains."""
        return range(e * self.stride, (e + 1) * self.stride)

    def trained(self, e: int) -> list[nn.Parameter]:
        """What a step with exit e changes: the factors of its window and its head."""
        blocks = [Backbone(self.model).layer(l).block for l in self.window(e)]
        factors = [p for block in blocks for name, p in block.named_parameters() if ".lora." in name]
        return [*factors, self.heads[e].weight]

    def hidden(self, ids: LongTensor, e: int) -> Tensor:
        """The residual [B, T, d] at exit e: factors in its window only, a graph from there on."""
        bb = Backbone(self.model)
        x, positions = self._start(bb, ids)
        with torch.no_grad(), without_lora(self.model):
            x = self._blocks(bb, x, positions, range(self.window(e).start))
        return self._blocks(bb, x, positions, self.window(e))

    def loss(self, ids: LongTensor, e: int, mask: Tensor | None = None) -> Tensor:
        """Mean next-token loss at exit e, nats; `mask` [B, T], 1 where a token is to be predicted."""
        logits = self._read(Backbone(self.model), self.hidden(ids, e), e)[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        if mask is None:
            return losses.mean()
        wanted = mask[:, 1:].to(losses.dtype)
        return (losses * wanted).sum() / wanted.sum()

    @torch.no_grad()
    def forward(self, ids: LongTensor) -> list[Tensor]:
        """Logits [B, T, V] of every exit, from one pass of both streams."""
        bb, found = Backbone(self.model), []
        x, positions = self._start(bb, ids)
        for e in range(self.n_exits):
            found.append(self._read(bb, self._blocks(bb, x, positions, self.window(e)), e))
            if e < self.n_exits - 1:
                with without_lora(self.model):
                    x = self._blocks(bb, x, positions, self.window(e))
        return found

    def _start(self, bb: Backbone, ids: LongTensor) -> tuple[Tensor, LongTensor]:
        bb.check_ids(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        with torch.no_grad():
            return bb.embed(ids, positions), positions

    def _blocks(self, bb: Backbone, x: Tensor, positions: LongTensor, layers: range) -> Tensor:
        for l in layers:
            mask = None if bb.window(l) is None else bb.mask(l, len(positions))
            x = bb.block(l, x, positions, mask)
        return x

    def _read(self, bb: Backbone, x: Tensor, e: int) -> Tensor:
        return self.heads[e](bb.ln_final(x))


@dataclass(frozen=True)
class Tuned:
    """What each step of the tuning did: the `exit` and its `loss` in nats."""

    exit: tuple[int, ...]
    loss: tuple[float, ...]


def schedule(steps: int, n_exits: int) -> list[int]:
    """The exit of each step: evenly from shallow to deep, what is left over to the deepest.

    >>> schedule(7, 3)
    [0, 0, 1, 1, 2, 2, 2]
    """
    if type(steps) is not int or steps < n_exits:
        raise ValueError(f"steps must be an integer >= {n_exits}, the number of exits, got {steps!r}")
    return [min(step // (steps // n_exits), n_exits - 1) for step in range(steps)]


def tune(
    exits: EarlyExits,
    ids: LongTensor,
    *,
    steps: int,
    generator: torch.Generator,
    mask: Tensor | None = None,
    batch: int = 8,
    lr: float = 4e-4,
    clip: float = 0.3,
) -> Tuned:
    """Adaptive layer tuning, in place, with AdamW without weight decay.

    Parameters
    ----------
    exits : the model with its exits.
    ids, mask : [N, T] token ids, and 1 where a token is to be predicted (None: all); positions after the last
        such token of a row may hold anything.
    steps : in all, at least one for each exit.
    generator : draws `batch` rows of ids for each step, with replacement.
    lr, clip : learning rate and largest norm of the gradient (the code's values).

    Returns a `Tuned`. Raises ValueError for values out of range, before anything is changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> g = torch.Generator().manual_seed(0)
    >>> exits = EarlyExits(tiny("gpt2"), 1, rank=2, generator=g)
    >>> tune(exits, random_ids(4, 8), steps=4, generator=g).exit
    (0, 1, 2, 2)
    """
    order = schedule(steps, exits.n_exits)
    Backbone(exits.model).check_ids(ids)
    if ids.shape[1] < 2:
        raise ValueError(f"ids: expected rows of 2 tokens or more, got {list(ids.shape)}")
    if mask is not None and (mask.shape != ids.shape or not bool((mask[:, 1:].sum(1) > 0).all())):
        raise ValueError(f"mask must be {list(ids.shape)} with a token to predict in each row")
    for name, value in (("lr", lr), ("clip", clip)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch must be an integer >= 1, got {batch!r}")
    losses, last = [], -1
    for e in order:
        if e != last:
            trained, last = exits.trained(e), e
            optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        rows = torch.randint(len(ids), (batch,), generator=generator, device=generator.device).to(ids.device)
        loss = exits.loss(ids[rows], e, None if mask is None else mask[rows])
        loss.backward(inputs=trained)
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return Tuned(tuple(order), tuple(losses))


def vote(logits: Sequence[Tensor]) -> Tensor:
    """Probabilities of the exits' vote: for each token the largest of their probabilities, renormalised.

    Parameters: `logits`, one [..., V] for each exit. Returns [..., V]. Raises ValueError for none, or for
    different shapes.

    >>> vote([torch.tensor([0.9, 0.1, 0.0]).log(), torch.tensor([0.2, 0.2, 0.6]).log()])
    tensor([0.5294, 0.1176, 0.3529])
    """
    if not logits or any(one.shape != logits[0].shape for one in logits):
        raise ValueError(f"logits must be of one shape, got {[list(one.shape) for one in logits]}")
    largest = torch.stack([one.softmax(-1) for one in logits]).amax(0)
    return largest / largest.sum(-1, keepdim=True)
