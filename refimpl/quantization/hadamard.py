"""Fast orthogonal transforms that spread a matrix out: randomized Hadamard (QuIP#), random Kronecker (QuIP).

Both are Kronecker products of small orthogonal factors, so that n numbers are transformed in O(n log n) or
O(n sqrt n) and not in n^2. Transforms act on the last axis: T(x) = V x for every row x.
"""

from functools import lru_cache
from math import isqrt, prod

import torch
from torch import Generator, Tensor

__all__ = [
    "RandomHadamard",
    "RandomKronecker",
    "Transform",
    "hadamard_factors",
    "incoherence",
    "kronecker",
    "rescaling",
    "rotate",
]

_RADIX = 16  # Hadamard factors of this order: one small product is faster than four passes of sums


@lru_cache(maxsize=64)
def hadamard_factors(n: int) -> tuple[Tensor, ...]:
    """Orthogonal factors, float64, whose Kronecker product is the transform of size n.

    Where a Hadamard matrix is known to us, n = 2^k or n = 2^k (q + 1) with q + 1 = 4 m, m odd and q prime
    (12, 20, 44, 60, ... times 2^k), all n^2 entries are +-1/sqrt(n): powers of two by Sylvester's doubling,
    the other factor by Paley's construction from squares modulo q. For every other n the odd part m has the
    discrete Hartley matrix (cos + sin)(2 pi jk / m) / sqrt(m), the real form of the Fourier transform that
    arXiv 2402.04396 falls back to; its entries are at most sqrt(2/m).

    Raises ValueError for n < 1.

    >>> [list(f.shape) for f in hadamard_factors(768)], [len(f) for f in hadamard_factors(36)]
    ([[12, 12], [16, 16], [4, 4]], [9, 4])
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n!r}")
    power = n & -n
    m = n // power
    factors = []
    if m > 1 and power >= 4 and _is_prime(4 * m - 1):
        factors.append(_paley(4 * m - 1))
        power //= 4
    elif m > 1:
        angle = 2 * torch.pi / m * (torch.outer(torch.arange(m), torch.arange(m)) % m).double()
        factors.append((angle.cos() + angle.sin()) / m**0.5)
    while power > 1 or not factors:
        order = min(power, _RADIX)
        factors.append(_sylvester(order))
        power //= order
    return tuple(factors)


def kronecker(x: Tensor, factors: tuple[Tensor, ...], *, transpose: bool = False) -> Tensor:
    """(F_1 (x) F_2 (x) ...) applied to the last axis of x, or the transpose of that.

    Each factor multiplies its own axis; a product of small matrices, never the large one.

    >>> F = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> kronecker(torch.tensor([1.0, 0.0, 2.0, 0.0]), (F, F))
    tensor([ 3.,  3., -1., -1.])
    """
    n = prod(f.shape[0] for f in factors)
    if x.shape[-1] != n:
        raise ValueError(f"x must have {n} numbers on its last axis, got {list(x.shape)}")
    for f in factors:
        f = f.to(x) if transpose else f.T.to(x)
        # The factor's axis goes to the end, where the next one follows: after all of them the order is back.
        x = (x.reshape(*x.shape[:-1], len(f), n // len(f)).transpose(-1, -2) @ f).flatten(-2)
    return x


class RandomHadamard:
    """x -> Had(s x): random signs, then the fixed transform (arXiv 2402.04396, section 3).

    Parameters: `signs` [n], +1 or -1. `inverse` undoes it.

    >>> transform = RandomHadamard.draw(12, torch.Generator().manual_seed(0))
    >>> x = torch.eye(12)[:2]
    >>> spread = transform(x)
    >>> torch.allclose(spread.abs(), torch.tensor(12**-0.5)), torch.allclose(transform.inverse(spread), x)
    (True, True)
    """

    def __init__(self, signs: Tensor) -> None:
        if signs.ndim != 1 or not bool((signs.abs() == 1).all()):
            raise ValueError(f"signs must be [n], +1 or -1, got {signs.dtype} {list(signs.shape)}")
        self.signs, self.factors = signs, hadamard_factors(len(signs))

    @classmethod
    def draw(cls, n: int, generator: Generator) -> "RandomHadamard":
        """Signs of n fair coins."""
        return cls(torch.randint(0, 2, (n,), generator=generator) * 2 - 1)

    def __call__(self, x: Tensor) -> Tensor:
        return kronecker(x * self.signs.to(x), self.factors)

    def inverse(self, x: Tensor) -> Tensor:
        return kronecker(x, self.factors, transpose=True) * self.signs.to(x)


class RandomKronecker:
    """x -> P_2 (A (x) B) P_1 x with random orthogonal A, B and permutations (arXiv 2307.13304, section 4).

    Parameters: `n` = p q, p and q as near to sqrt(n) as divisors can be; `generator`. A and B are drawn from
    the uniform (Haar) measure. The paper permutes by one P; its code before and after the factors, as here.

    >>> transform = RandomKronecker(24, torch.Generator().manual_seed(0))
    >>> x = torch.eye(24)
    >>> torch.allclose(transform.inverse(transform(x)), x, atol=1e-6), [len(f) for f in transform.factors]
    (True, [4, 6])
    """

    def __init__(self, n: int, generator: Generator) -> None:
        if type(n) is not int or n < 1:
            raise ValueError(f"n must be an integer >= 1, got {n!r}")
        p = next(p for p in range(isqrt(n), 0, -1) if n % p == 0)
        self.before = torch.randperm(n, generator=generator)
        self.factors = (_haar(p, generator), _haar(n // p, generator))
        self.after = torch.randperm(n, generator=generator)

    def __call__(self, x: Tensor) -> Tensor:
        before, after = self.before.to(x.device), self.after.to(x.device)
        return kronecker(x[..., before], self.factors)[..., after]

    def inverse(self, x: Tensor) -> Tensor:
        before, after = self.before.argsort().to(x.device), self.after.argsort().to(x.device)
        return kronecker(x[..., after], self.factors, transpose=True)[..., before]


Transform = RandomHadamard | RandomKronecker


def rotate(W: Tensor, H: Tensor, left: Transform, right: Transform) -> tuple[Tensor, Tensor]:
    """W' = L W R' [d_out, d_in] and H' = R H R' [d_in, d_in], float64.

    >>> generator = torch.Generator().manual_seed(0)
    >>> left, right = (RandomHadamard.draw(n, generator) for n in (32, 64))
    >>> W = torch.eye(32, 64)
    >>> incoherence(W), incoherence(rotate(W, torch.eye(64), left, right)[0]) < 6
    (8.0, True)
    """
    W, H = W.double(), H.double()
    return left(right(W).T).T, right(right(H).T).T


def rescaling(W: Tensor, H: Tensor) -> Tensor:
    """s [d_in], float16: s_j = (H_jj / ||W_j||^2)^(1/4), the columns' balance between weight and input.

    W diag(s) and diag(1/s) H diag(1/s) have the same product, and the least tr(W'W) tr(H) (QuIP, appendix B).
    Geometric mean 1; inputs or columns that are zero count as the mean of the others.
    """
    ratio = [_positive(H.diagonal().double()), _positive(W.double().square().sum(0))]
    s = (ratio[0] / ratio[1]) ** 0.25
    return (s / s.log().mean().exp()).clamp(2**-10, 2**10).half()


def incoherence(W: Tensor) -> float:
    """mu(W) = max |W_ij| sqrt(m n) / ||W||_F of W [m, n]: 1 for equal magnitudes, sqrt(m n) for one spike.

    About 4 to 5 for a Gaussian matrix of a small layer.

    >>> incoherence(torch.ones(2, 3)), incoherence(torch.eye(4))
    (1.0, 2.0)
    """
    if W.ndim != 2 or not bool((W != 0).any()) or not bool(W.isfinite().all()):
        raise ValueError(f"W must be a finite matrix that is not all zero, got {list(W.shape)}")
    return float(W.abs().max().double() * W.numel() ** 0.5 / W.double().norm())


def _positive(values: Tensor) -> Tensor:
    """Zeros replaced by the mean of the others, or by 1."""
    live = values > 0
    return values.where(live, values[live].mean() if bool(live.any()) else 1.0)


def _sylvester(order: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < order:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / order**0.5


def _paley(q: int) -> Tensor:
    """The Hadamard matrix I + S of order q + 1, q = 3 mod 4 a prime; S has the Legendre symbols of i - j."""
    symbol = -torch.ones(q, dtype=torch.float64)
    symbol[torch.arange(1, q) ** 2 % q] = 1
    symbol[0] = 0
    index = torch.arange(q)
    H = torch.eye(q + 1, dtype=torch.float64)
    H[0, 1:], H[1:, 0] = 1, -1
    H[1:, 1:] += symbol[(index[:, None] - index) % q]
    return H / (q + 1) ** 0.5


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, isqrt(q) + 1))


def _haar(n: int, generator: Generator) -> Tensor:
    # The QR factors of a Gaussian matrix are uniform once the signs of R's diagonal are made unique.
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()
