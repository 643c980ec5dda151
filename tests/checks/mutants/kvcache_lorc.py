"""Plausible but wrong LoRC that `check_lorc` and `check_progressive_ranks` must reject."""

import torch

from refimpl.kvcache.lorc import Latent, progressive_ranks, right_singular_vectors


class Dense(Latent):
    """Stores full keys and values (the system switched off)."""

    def __init__(self, model, ranks, *, per_head=None):
        super().__init__(model, ranks, per_head=per_head)
        groups, width, _ = self.bases[0][0].shape
        full = torch.eye(width).expand(groups, -1, -1)
        self.bases = [(full, full) for _ in self.bases]


class OtherWeights(Latent):
    """Takes the singular vectors of weights that are not the layer's."""

    def __init__(self, model, ranks, *, per_head=None):
        super().__init__(model, ranks, per_head=per_head)
        self.bases = [
            tuple(right_singular_vectors(_wide(V), self.N, V.shape[-1]) for V in pair) for pair in self.bases
        ]


def _wide(V):
    columns = V.shape[0] * V.shape[1]
    return torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(0))


class SmallestValues(Latent):
    """Keeps the smallest singular values."""

    def __init__(self, model, ranks, *, per_head=None):
        super().__init__(model, ranks, per_head=per_head)
        whole = Latent(model, [self.bases[0][0].shape[1]] * len(ranks), per_head=per_head)
        self.bases = [
            tuple(V[..., -r:].contiguous() for V in pair) for pair, r in zip(whole.bases, ranks, strict=True)
        ]


class OneRankForAll(Latent):
    """Ignores the schedule."""

    def __init__(self, model, ranks, *, per_head=None):
        super().__init__(model, ranks, per_head=per_head)
        mean = round(sum(ranks) / len(ranks))
        self.bases = Latent(model, [mean] * len(ranks), per_head=per_head).bases


class BiasInTheBasis(Latent):
    """Projects the bias as well."""

    def __init__(self, model, ranks, *, per_head=None):
        super().__init__(model, ranks, per_head=per_head)
        self.biases = [(None, None) for _ in self.biases]


def reversed_ranks(kappa, r_max, r_min):
    return progressive_ranks(kappa, r_max, r_min)[::-1]


def from_the_front(kappa, r_max, r_min):
    return progressive_ranks(kappa.flip(0), r_max, r_min)[::-1]


def without_logarithm(kappa, r_max, r_min):
    progressive_ranks(kappa, r_max, r_min)
    product = kappa.double().prod(1).flip(0).cumprod(0).flip(0)
    fallen = (product.max() - product) / (product.max() - product.min())
    return [round(r) for r in (r_max - fallen * (r_max - r_min)).tolist()]


def uniform(kappa, r_max, r_min):
    progressive_ranks(kappa, r_max, r_min)
    return [(r_max + r_min) // 2] * len(kappa)


MUTANTS = [
    ("lorc", "nothing is compressed", Dense),
    ("lorc", "the basis belongs to other weights", OtherWeights),
    ("lorc", "the smallest singular values are kept", SmallestValues),
    ("lorc", "all layers get the mean rank", OneRankForAll),
    ("lorc", "the bias is projected like the rest", BiasInTheBasis),
    ("progressive_ranks", "deep layers keep most", reversed_ranks),
    ("progressive_ranks", "condition numbers are multiplied from the first layer on", from_the_front),
    ("progressive_ranks", "products in place of their logarithms", without_logarithm),
    ("progressive_ranks", "the same rank everywhere", uniform),
]
