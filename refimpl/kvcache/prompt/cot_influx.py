"""CoT-Influx (arXiv 2312.08901): a policy prunes few-shot examples, then their tokens, for a frozen LLM.

More examples help until the window is full; pruned ones leave room for more. Two heads on the features of a
frozen encoder decide, coarse to fine: keep a shot or drop it; keep a token of a kept shot or drop it.
Deletion has no gradient, so the heads are trained by REINFORCE: the frozen LLM's loss and success on the
question, times how well the token limit is used, is the reward.

Conventions: k candidate shots of at most N tokens, features [..., k, N, d], mask [..., k, N] True at tokens;
leading dimensions are questions Q, or samples and questions [S, Q]. t tokens count the whole prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.world.tokens import EOT, PAD

START_KEEP = 0.9  # of a token, before training


class Pruner(nn.Module):
    """The policy: two multi-layer perceptrons on frozen features.

    Implements the two-stage pruner of CoT-Influx, arXiv 2312.08901. The shot head reads the mean of a shot's
    token features, the token head each token's. Before training every shot is kept with probability 1/2 and
    every token with 0.9 (our choice: the paper states no start).

    Parameters: d, width of the features; hidden, width of the heads (default 512: 0.27 M parameters at d =
    256; the paper's pruner has 5 M); generator of the initial weights. Raises ValueError for sizes < 1.

        pi(keep shot i) = sigmoid(MLP_1(mean_n h_in))
        pi(keep token n of shot i | shot i kept) = sigmoid(MLP_2(h_in))

    >>> pruner = Pruner(8, 16, torch.Generator().manual_seed(0))
    >>> h, mask = torch.ones(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    >>> pruner.shot_logits(h, mask).sigmoid().tolist(), tuple(pruner.token_logits(h).shape)
    ([0.5, 0.5, 0.5], (3, 5))
    """

    def __init__(self, d: int, hidden: int = 512, generator: torch.Generator | None = None) -> None:
        super().__init__()
        for name, size in (("d", d), ("hidden", hidden)):
            if size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        self.shot = _head(d, hidden, 0.0, generator)
        self.token = _head(d, hidden, math.log(START_KEEP / (1 - START_KEEP)), generator)

    def shot_logits(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return the log-odds [..., k] of keeping each shot."""
        check_features(features, mask)
        weight = mask.to(features.dtype) / mask.sum(-1, keepdim=True)
        return self.shot(torch.einsum("...n,...nd->...d", weight, features))[..., 0]

    def token_logits(self, features: Tensor) -> Tensor:
        """Return the log-odds [..., k, N] of keeping each token, should its shot be kept."""
        return self.token(features)[..., 0]


def _head(d: int, hidden: int, bias: float, generator: torch.Generator | None) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator
        head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, 1))
    nn.init.normal_(head[1].weight, std=d**-0.5, generator=generator)
    nn.init.zeros_(head[1].bias)
    nn.init.zeros_(head[3].weight)
    nn.init.constant_(head[3].bias, bias)
    return head


def check_features(features: Tensor, mask: Tensor) -> None:
    """ValueError unless features [..., k, N, d] are finite and mask [..., k, N] has a token in every shot."""
    if features.ndim < 3 or mask.dtype != torch.bool or mask.shape != features.shape[:-1]:
        raise ValueError(
            f"mask: expected bool {list(features.shape[:-1])} for features {list(features.shape)}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if features.numel() == 0 or not bool(mask.any(-1).all()):
        raise ValueError("mask: every shot needs at least one token")
    if not bool(torch.isfinite(features[mask]).all()):
        raise ValueError("features: hold NaN or infinity")


class Actions(NamedTuple):
    """What a policy did: shots bool [..., k], tokens bool [..., k, N] (False in dropped shots), log_prob."""

    shots: Tensor
    tokens: Tensor
    log_prob: Tensor


def sample_actions(
    pruner: Pruner, features: Tensor, mask: Tensor, samples: int, generator: torch.Generator
) -> Actions:
    """Draw prunings and their log-probability, with the policy's gradient.

    Parameters: pruner; features [Q, k, N, d]; mask [Q, k, N]; samples S per question; generator, on the CPU.
    Returns Actions with leading dimensions [S, Q]. The second stage acts on kept shots only: tokens of a
    dropped shot have no action and no share in the log-probability. Raises ValueError for samples < 1 and as
    `check_features` does.

        log pi(a) = sum_i log Bern(a_i; p_i) + sum_{i kept} sum_n log Bern(a_in; p_in)
    """
    if samples < 1:
        raise ValueError(f"samples must be an integer >= 1, got {samples!r}")
    shot, token = pruner.shot_logits(features, mask), pruner.token_logits(features)
    kept = torch.rand(samples, *shot.shape, generator=generator).to(shot.device) < shot.sigmoid()
    drawn = torch.rand(samples, *token.shape, generator=generator).to(token.device) < token.sigmoid()
    acting = mask & kept[..., None]
    tokens = drawn & acting
    log_shot = _log_bernoulli(shot, kept).sum(-1)
    log_token = _log_bernoulli(token, tokens).masked_fill(~acting, 0.0).sum((-2, -1))
    return Actions(kept, tokens, log_shot + log_token)


def _log_bernoulli(logits: Tensor, action: Tensor) -> Tensor:
    return F.logsigmoid(torch.where(action, logits, -logits))


def reward(loss: Tensor, correct: Tensor, tokens: Tensor, limit: int) -> Tensor:
    """Return the reward of pruned prompts.

    Parameters, all of one shape: loss of the gold answer, mean nats per token; correct, whether the answer is
    right (R_acc 1 or 0); tokens t of the prompt, >= 1; limit T >= 1. Below the limit the reward grows with t:
    the formula itself pays for filling the window, whatever it is filled with; above, it falls as 1/t, so
    t = T is a kink. Raises ValueError for a limit or t below 1 and a loss that is negative or not finite.

        r = (1 / (1 + L) + R_acc) (t / T)^w,   w = 1 if t <= T, else -1

    >>> t = torch.tensor([80, 160, 320])
    >>> reward(torch.zeros(3), torch.ones(3), t, limit=160).tolist()
    [1.0, 2.0, 1.0]
    """
    if limit < 1 or bool((tokens < 1).any()):
        raise ValueError(f"limit and tokens must be >= 1, got {limit} and {tokens.min().item()}")
    if not bool(torch.isfinite(loss).all()) or bool((loss < 0).any()):
        raise ValueError("loss: negative or not finite")
    used = tokens.to(loss.dtype) / limit
    return (1 / (1 + loss) + correct.to(loss.dtype)) * torch.where(tokens <= limit, used, 1 / used)


def reinforce_loss(log_prob: Tensor, rewards: Tensor, baseline: float | Tensor) -> Tensor:
    """Return a scalar whose gradient estimates that of the expected reward, with the sign of a loss.

    Parameters: log_prob and rewards of one shape; baseline b, which must not depend on these actions: then it
    changes the variance and not the mean. Raises ValueError for shapes that differ and rewards not finite.

        grad E[r] = E[(r - b) grad log pi(a)]
    """
    if log_prob.shape != rewards.shape or log_prob.numel() == 0:
        raise ValueError(f"rewards: shape {list(rewards.shape)}, log_prob has {list(log_prob.shape)}")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards: NaN or infinity")
    return -((rewards - baseline).detach() * log_prob).mean()


class MovingAverage:
    """An exponential moving average of mean rewards: the baseline, known before the actions are drawn.

    Parameters: decay in [0, 1), default 0.9; start, its first value. Raises ValueError for a decay out of
    range.

    >>> b = MovingAverage(0.5, start=1.0)
    >>> b.update(torch.tensor([2.0, 4.0])); b.value
    2.0
    """

    def __init__(self, decay: float = 0.9, start: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}")
        self.decay, self.value = decay, start

    def update(self, rewards: Tensor) -> None:
        """Move towards the mean of `rewards`."""
        self.value = self.decay * self.value + (1 - self.decay) * rewards.mean().item()


def fill(score: Tensor, sizes: LongTensor, budget: LongTensor) -> Tensor:
    """Take shots by descending score until one does not fit; that one and all after it stay out.

    Parameters: score [Q, k], -inf for a shot that must stay out; sizes [Q, k] in tokens; budget [Q], >= 0.
    Returns bool [Q, k]; of equal scores the first shot wins. Raises ValueError for shapes that do not fit,
    a NaN and a negative budget.

    >>> fill(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[5, 5, 5]]), torch.tensor([10])).tolist()
    [[False, True, True]]
    """
    if score.ndim != 2 or sizes.shape != score.shape or budget.shape != score.shape[:1]:
        shapes = [list(x.shape) for x in (score, sizes, budget)]
        raise ValueError(f"score, sizes, budget: expected [Q, k], [Q, k], [Q], got {shapes}")
    if bool(score.isnan().any()) or bool((budget < 0).any()):
        raise ValueError("score holds NaN, or budget is negative")
    order = score.argsort(descending=True, stable=True)
    fits = sizes.gather(1, order).cumsum(1) <= budget[:, None]
    return torch.zeros_like(fits).scatter_(1, order, fits) & (score > -math.inf)


@torch.no_grad()
def prune(pruner: Pruner, features: Tensor, mask: Tensor, budget: LongTensor) -> Tensor:
    """Prune greedily: what is kept with probability above 1/2, the surest shots first, until the budget.

    Parameters: pruner; features [Q, k, N, d]; mask [Q, k, N]; budget [Q], tokens left for the shots (the
    limit T less the rest of the prompt). Returns bool [Q, k, N], the kept tokens: read off in order they are
    a subsequence of the candidates, of at most `budget` tokens. Raises ValueError as `fill` and
    `check_features` do.
    """
    shot, tokens = pruner.shot_logits(features, mask), (pruner.token_logits(features) > 0) & mask
    shots = fill(shot.masked_fill(shot <= 0, -math.inf), tokens.sum(-1), budget)
    return tokens & shots[..., None]


@torch.no_grad()
def encode(
    encoder: nn.Module, questions: Sequence[Sequence[int]], shots: Sequence[Sequence[Sequence[int]]],
    layer: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return a frozen causal model's hidden states of every shot's tokens, read after the question.

    Parameters: encoder, a causal language model; questions, token ids of each (may be empty: the shots are
    then read alone); shots, k lists of token ids for each; layer in 0..n_layers (0: the embeddings). The
    question stands in front because a causal model looks back only: this way a shot's features know what is
    asked. Returns features float32 [Q, k, N, d] and mask [Q, k, N]. Raises ValueError for no questions, an
    empty shot, other numbers of shots, a layer out of range and rows longer than the model's context.
    """
    k = len(shots[0]) if shots else 0
    if len(questions) != len(shots) or k == 0 or any(len(s) != k or not all(map(len, s)) for s in shots):
        raise ValueError(f"shots: every one of {len(questions)} questions needs the same k >= 1 full shots")
    if not 0 <= layer <= encoder.config.num_hidden_layers:
        raise ValueError(f"layer must be in 0..{encoder.config.num_hidden_layers}, got {layer!r}")
    device = next(encoder.parameters()).device
    heads = [[EOT, *q] for q in questions]
    rows = [[*head, *shot] for head, of_question in zip(heads, shots, strict=True) for shot in of_question]
    width, context = max(map(len, rows)), encoder.config.max_position_embeddings
    if width > context:
        raise ValueError(f"shots: question and shot hold {width} tokens, the encoder's context is {context}")
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=device)
    states = encoder.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    start = torch.tensor([len(head) for head in heads for _ in range(k)], device=device)
    length = torch.tensor([len(row) for row in rows], device=device) - start
    n = torch.arange(int(length.max()), device=device)
    at = (start[:, None] + n).clamp(max=width - 1)
    features = states[layer].float().gather(1, at[..., None].expand(-1, -1, states[layer].shape[-1]))
    mask = n < length[:, None]
    shape = (len(questions), k, len(n))
    return features.masked_fill(~mask[..., None], 0.0).view(*shape, -1), mask.view(shape)
