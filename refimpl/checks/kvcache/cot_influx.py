"""The checks of CoT-Influx (kv-cache spec 30): gradient by enumeration, reward, greedy pruning."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "cot_influx": "refimpl.kvcache.prompt.cot_influx:sample_actions",
    "cot_influx_reward": "refimpl.kvcache.prompt.cot_influx:reward",
    "cot_influx_prune": "refimpl.kvcache.prompt.cot_influx:prune",
}
SAMPLES = 20_000
SHOTS = torch.tensor([[0.4, -0.7, 0.1]])
TOKENS = torch.tensor([[[0.6, -0.3], [0.2, 0.9], [-0.5, 0.0]]])
MASK = torch.tensor([[[True, True], [True, False], [True, True]]])  # the second shot has one token


class _Policy(nn.Module):
    """Log-odds that are parameters, whatever the features."""

    def __init__(self, shots: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self.shots, self.tokens = nn.Parameter(shots.clone()), nn.Parameter(tokens.clone())

    def shot_logits(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.shots

    def token_logits(self, features: Tensor) -> Tensor:
        return self.tokens


@check
def check_cot_influx(sample_actions: Callable) -> None:
    """`sample_actions(pruner, features, mask, samples, generator)` -> (shots, tokens, log_prob)."""
    policy = _Policy(SHOTS, TOKENS)
    draw = torch.Generator().manual_seed(0)
    shots, tokens, log_prob = sample_actions(policy, torch.zeros(1, 3, 2, 1), MASK, SAMPLES, draw)
    for name, value, shape in (
        ("shots", shots, (SAMPLES, 1, 3)), ("tokens", tokens, (SAMPLES, 1, 3, 2)),
        ("log_prob", log_prob, (SAMPLES, 1)),
    ):  # fmt: skip
        require(tuple(value.shape) == shape, f"{name}: shape {tuple(value.shape)} instead of {shape}")
    require(not bool((tokens & ~MASK).any()), "tokens: padding was kept")
    require(not bool((tokens & ~shots[..., None]).any()), "tokens: a token of a dropped shot was kept")

    outcomes = {code: log_p for code, log_p in _outcomes(policy)}
    codes = [_code(s, t) for s, t in zip(shots[:, 0].tolist(), tokens[:, 0].tolist(), strict=True)]
    expected = torch.stack([outcomes[code] for code in codes]).detach()
    require_close(log_prob[:, 0], expected, 1e-4, "log_prob against the outcome's own log-probability")
    for code, log_p in outcomes.items():
        found, p = codes.count(code) / SAMPLES, log_p.exp().item()
        require(
            abs(found - p) < 5 * (p * (1 - p) / SAMPLES) ** 0.5,
            f"outcome {code}: drawn with frequency {found:.4f}, its probability is {p:.4f}",
        )

    names = list(outcomes)
    value = dict(zip(names, torch.rand(len(names), generator=draw).tolist(), strict=True))
    exact = torch.autograd.grad(
        sum(log_p.exp() * value[code] for code, log_p in outcomes.items()), list(policy.parameters())
    )
    advantage = torch.tensor([value[code] for code in codes]) - 0.5
    estimate = torch.autograd.grad((advantage * log_prob[:, 0]).mean(), list(policy.parameters()))
    for name, got, wanted in zip(("shot", "token"), estimate, exact, strict=True):
        require_close(got, wanted, 0.01, f"REINFORCE gradient of the {name} log-odds against enumeration")
    again = sample_actions(policy, torch.zeros(1, 3, 2, 1), MASK, 8, torch.Generator().manual_seed(0))
    other = sample_actions(policy, torch.zeros(1, 3, 2, 1), MASK, 8, torch.Generator().manual_seed(0))
    require(torch.equal(again[1], other[1]), "two generators with one seed gave different actions")


@check
def check_cot_influx_reward(reward: Callable) -> None:
    """`reward(loss, correct, tokens, limit)` -> (1 / (1 + L) + R_acc) (t / T)^w."""
    limit = 160
    for loss in (0.0, 0.5, 3.0):
        for right in (False, True):
            t = torch.tensor([1, 80, 159, 160, 161, 320])
            got = reward(torch.full((6,), loss), torch.full((6,), right), t, limit)
            size = torch.tensor([1 / 160, 0.5, 159 / 160, 1.0, 160 / 161, 0.5])
            wanted = (1 / (1 + loss) + right) * size
            require_close(got, wanted, 1e-5, f"loss {loss}, correct {right}, t {t.tolist()}, T {limit}")
    one = torch.ones(1)
    require_error(ValueError, lambda: reward(one, one > 0, torch.tensor([0]), limit), "t = 0")
    nan, five = one * torch.nan, torch.tensor([5])
    require_error(ValueError, lambda: reward(nan, one > 0, five, limit), "a loss of NaN")


@check
def check_cot_influx_prune(prune: Callable) -> None:
    """`prune(pruner, features, mask, budget)` -> bool [Q, k, N], what greedy pruning keeps."""
    draw = torch.Generator().manual_seed(1)
    Q, k, N = 6, 5, 4
    shots, tokens = (torch.randn(shape, generator=draw) for shape in ((Q, k), (Q, k, N)))
    mask = torch.arange(N) < torch.randint(1, N + 1, (Q, k), generator=draw)[..., None]
    features, policy = torch.zeros(Q, k, N, 1), _Policy(shots, tokens)
    for limit in (0, 1, 3, 6, 100):
        got = prune(policy, features, mask, torch.full((Q,), limit))
        require(tuple(got.shape) == (Q, k, N), f"shape {tuple(got.shape)} instead of {(Q, k, N)}")
        for q in range(Q):
            wanted, left = torch.zeros(k, N, dtype=torch.bool), limit
            for i in sorted(range(k), key=lambda i: -shots[q, i].item()):
                kept = (tokens[q, i] > 0) & mask[q, i]
                if shots[q, i] <= 0 or kept.sum() > left:
                    break
                wanted[i], left = kept, left - int(kept.sum())
            where, mine = f"budget {limit}, question {q}", got[q]
            require(int(mine.sum()) <= limit, f"{where}: {int(mine.sum())} tokens are kept")
            require(
                torch.equal(mine, wanted),
                f"{where}: kept {mine.int().tolist()} instead of {wanted.int().tolist()}",
            )


def _outcomes(policy: _Policy) -> Iterator[tuple[tuple, Tensor]]:
    """Every outcome of both stages and its log-probability: tokens are drawn in kept shots alone."""
    p_shot, p_token = policy.shots[0].sigmoid(), policy.tokens[0].sigmoid()
    for shots in itertools.product((False, True), repeat=3):
        places = [(i, n) for i in range(3) for n in range(2) if shots[i] and MASK[0, i, n]]
        for drawn in itertools.product((False, True), repeat=len(places)):
            kept = [[False, False] for _ in range(3)]
            p = torch.stack([p_shot[i] if shots[i] else 1 - p_shot[i] for i in range(3)]).log().sum()
            for (i, n), keep in zip(places, drawn, strict=True):
                kept[i][n] = keep
                p = p + (p_token[i, n] if keep else 1 - p_token[i, n]).log()
            yield _code(shots, kept), p


def _code(shots: list[bool], tokens: list[list[bool]]) -> tuple:
    return tuple(shots), tuple(keep for row in tokens for keep in row)
