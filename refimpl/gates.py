"""Hard concrete gates: random gates in [0, 1] that are exactly 0 or 1 with a probability one can train.

Implements arXiv 1712.01312, section 2.2. A gate is a logistic variable, squashed, stretched a
little beyond [0, 1] and clipped: what was stretched out falls on 0 or 1, and the rest has a gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HardConcrete"]


@dataclass(frozen=True)
class HardConcrete:
    """The distribution of g = clip(sigmoid((log u - log(1 - u) + log a) / t) (high - low) + low, 0, 1).

    Parameters
    ----------
    temperature : t > 0; the lower, the more gates are 0 or 1. 0.33 in Voita et al. (P19-1580), 2/3 in the
        paper of the distribution.
    low, high : the interval that (0, 1) is stretched to; low < 0 and high > 1, else 0 or 1 has no mass.
    eps : u is drawn from [eps, 1 - eps].

    The location log a is the caller's, of any shape and floating type: 0 is neutral, large opens the gate.
    Keep it out of weight decay, which would pull it to 0. Raises ValueError for parameters out of range.

    Examples
    --------
    >>> gate, log_a = HardConcrete(), torch.tensor([-3.0, 0.0, 3.0])
    >>> gate.sample(log_a, torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    >>> [round(p, 3) for p in gate.p_open(log_a).tolist()], gate.at_test(log_a).tolist()
    ([0.099, 0.688, 0.978], [0.0, 0.5, 1.0])
    """

    temperature: float = 0.33
    low: float = -0.1
    high: float = 1.1
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not (-math.inf < self.low < 0 and 1 < self.high < math.inf):
            raise ValueError(f"low must be < 0 and high > 1, got {self.low} and {self.high}")
        if not 0 < self.eps < 0.5:
            raise ValueError(f"eps must lie in (0, 0.5), got {self.eps}")

    def sample(self, log_a: Tensor, generator: torch.Generator) -> Tensor:
        """One random gate in [0, 1] for each location, of its shape; differentiable in `log_a`."""
        _check(log_a)
        u = torch.rand(log_a.shape, generator=generator, dtype=log_a.dtype, device=generator.device)
        u = (self.eps + (1 - 2 * self.eps) * u).to(log_a.device)
        return self._stretched(torch.sigmoid((u.logit() + log_a) / self.temperature))

    def p_open(self, log_a: Tensor) -> Tensor:
        """P(g > 0) = sigmoid(log a - t log(-low / high)), of `log_a`'s shape: what an L0 penalty sums."""
        _check(log_a)
        return torch.sigmoid(log_a - self.temperature * math.log(-self.low / self.high))

    def at_test(self, log_a: Tensor) -> Tensor:
        """The gate without noise, clip(sigmoid(log a) (high - low) + low, 0, 1).

        The temperature is not in it (in both papers), so it is not the median draw: it is 0 only
        where log a <= log(-low / high), -2.4 by default, and a sixth of the draws is open there.
        """
        _check(log_a)
        return self._stretched(torch.sigmoid(log_a))

    def _stretched(self, s: Tensor) -> Tensor:
        return (s * (self.high - self.low) + self.low).clamp(0, 1)


def _check(log_a: Tensor) -> None:
    if not isinstance(log_a, Tensor) or not log_a.is_floating_point():
        got = log_a.dtype if isinstance(log_a, Tensor) else type(log_a).__name__
        raise TypeError(f"log_a must be a floating point tensor, got {got}")
    if log_a.numel() == 0 or bool(log_a.isnan().any()):
        raise ValueError(f"log_a must be numbers, at least one, got {list(log_a.shape)} with NaN or nothing")
