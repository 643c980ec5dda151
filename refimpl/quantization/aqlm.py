"""AQLM: every group of weights is the sum of codewords, and the layer's outputs decide which.

Implements arXiv 2401.06118 (Additive Quantization of Language Models), phases 1 and 2, as in its authors'
code: W^ of row i and group j is s_i sum_m C_m[code_ijm]; codebooks begin as k-means of the normalised weights
and then of what is left; two phases alternate until an epoch gains less than 1 %, both on

    L = tr((W - W^) H (W - W^)') / d_out:

Adam on codebooks and scales, and beam search over the codes. Its third phase, which fine-tunes the codebooks
of a block for the block's output, is left out, as are groups of more than one row and scales per group.

Where this differs from the code: an epoch of Adam or a beam search that ends above where it began is undone
(the code keeps the first); codes have at most 8 bits (the paper's best 7B models use one codebook of 16,
which takes more bytes than a small matrix).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.codebooks import CodebookLinear, Codebooks, decode, kmeans, random_points

__all__ = ["AQLM", "Additive", "beam_search", "residual_kmeans"]


class Additive(NamedTuple):
    """Codes, uint8 [d_out, d_in / g, M]; codebooks [M, K, g] and scale [d_out], float32; W^ = `restore`."""

    codes: Tensor
    codebooks: Tensor
    scale: Tensor

    def restore(self) -> Tensor:
        """W^ [d_out, d_in]."""
        return decode(self.codes, self.codebooks[None, None]) * self.scale[:, None]


@dataclass(frozen=True)
class AQLM:
    """Additive codebooks, chosen for the layer's outputs.

    Parameters
    ----------
    codebooks : M, 1 or more (the paper: 1 or 2). Code bits per weight are M b / g.
    bits : b of a code, 1 to 8; a codebook has K = 2^b vectors and costs 16 K g bits.
    group : g, neighbouring weights of a row that share M codes (the paper: 8), a divisor of d_in.
    beam : hypotheses of the beam search for each row; 1 is greedy, and the code's default.
    epochs : of Adam and beam search, at most; 0: k-means only.
    steps, lr : Adam steps in an epoch and their size (100, 1e-4; betas 0 and 0.95, AMSGrad).
    tolerance : stop after an epoch that lowers L by less than this share (0.01).
    iterations : of k-means, at most (100).
    seed : of the first centroids and of the order of the search, the same for every layer.

    An object is a recipe of `compress_model`. Raises ValueError for values that are not allowed.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(32, 16, generator=generator), torch.randn(64, 16, generator=generator)
    >>> layer = AQLM(codebooks=2, bits=4, group=4, epochs=1).layer(W, X.T @ X)
    >>> {name: tuple(b.shape) for name, b in layer.named_buffers()}
    {'codes': (128,), 'codebooks': (1, 1, 2, 16, 4), 'scale': (32,)}
    """

    codebooks: int = 2
    bits: int = 4
    group: int = 4
    beam: int = 1
    epochs: int = 10
    steps: int = 100
    lr: float = 1e-4
    tolerance: float = 0.01
    iterations: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        lows = {"codebooks": 1, "bits": 1, "group": 1, "beam": 1, "epochs": 0, "steps": 0, "iterations": 0}
        for name, low in lows.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if self.bits > 8:
            raise ValueError(f"bits must be at most 8, got {self.bits}")
        if not self.lr > 0:
            raise ValueError(f"lr must be a number > 0, got {self.lr!r}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be an integer, got {self.seed!r}")

    def solve(
        self, W: Tensor, H: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Additive, list[float]]:
        """Codes, codebooks and scales of W [d_out, d_in] for inputs with H = 2/N sum x x' [d_in, d_in].

        `generator` None: one with the recipe's seed. Returns them and L after k-means and after every phase.
        Raises ValueError for a W or H that is no finite matrix of that shape, a d_in that `group` does not
        divide, and fewer groups than a codebook has vectors.
        """
        W, H = _checked(W, H, self.group)
        generator = generator or torch.Generator().manual_seed(self.seed)
        scale = W.norm(dim=1).clamp(min=1e-8)
        points = (W / scale[:, None]).view(-1, self.group)
        codes, books = residual_kmeans(points, self.codebooks, 1 << self.bits, self.iterations, generator)
        now = Additive(codes.view(len(W), -1, self.codebooks), books, scale)
        losses = [_loss(W, H, now)]
        parameters = [now.codebooks.clone().requires_grad_(), now.scale.clone().requires_grad_()]
        adam = torch.optim.Adam(parameters, lr=self.lr, betas=(0.0, 0.95), amsgrad=True)
        for _ in range(self.epochs):
            began = losses[-1]
            for phase in ("adam", "beam"):
                if phase == "adam":
                    tried = self._descend(W, H, now, parameters, adam)
                else:
                    tried = now._replace(codes=beam_search(W, H, now, self.beam, generator))
                loss = _loss(W, H, tried)
                now = tried if loss <= losses[-1] else now
                losses.append(min(loss, losses[-1]))
            if losses[-1] > (1 - self.tolerance) * began:
                break
        return now, losses

    def layer(self, W: Tensor, H: Tensor) -> CodebookLinear:
        """The compressed layer, codebooks and scales in float16; parameters and errors as `solve`."""
        found, _ = self.solve(W, H)
        books = Codebooks.store(found.codebooks[None, None], "float16")
        return CodebookLinear.pack(found.codes, books, self.bits, found.scale.half())

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> CodebookLinear:
        return self.layer(weight, stats.H)

    def _descend(
        self, W: Tensor, H: Tensor, now: Additive, parameters: list[Tensor], adam: torch.optim.Adam
    ) -> Additive:
        """Codebooks and scales after some steps of Adam, codes fixed."""
        with torch.no_grad():
            for parameter, value in zip(parameters, now[1:], strict=True):
                parameter.copy_(value)
        for _ in range(self.steps):
            adam.zero_grad()
            restored = Additive(now.codes, *parameters).restore()
            # The gradient of L in W^, given to autograd at once: one product with H in place of two.
            restored.backward(2 / len(W) * (restored.detach() - W) @ H)
            adam.step()
        return Additive(now.codes, *(parameter.detach().clone() for parameter in parameters))


def residual_kmeans(
    points: Tensor, M: int, K: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [N, M], and codebooks [M, K, g]: k-means of points [N, g], then of what that leaves, ...

    Raises ValueError for fewer points than K.

    >>> points = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> codes, books = residual_kmeans(points, 2, 2, 10, torch.Generator().manual_seed(0))
    >>> (books[0, codes[:, 0].long()] + books[1, codes[:, 1].long()]).flatten().tolist()
    [0.0, 1.0, 4.0, 5.0]
    """
    left, codes, books = points.clone(), [], []
    for _ in range(M):
        book, code = kmeans(left[None], random_points(left, K, generator)[None], iterations=iterations)
        left -= book[0, code[0]]
        codes.append(code[0])
        books.append(book[0])
    return torch.stack(codes, 1).to(torch.uint8), torch.stack(books)


def beam_search(
    W: Tensor, H: Tensor, now: Additive, beam: int, generator: torch.Generator | None = None
) -> Tensor:
    """New codes, uint8 [d_out, d_in / g, M], that lower tr((W - W^) H (W - W^)'), codebooks and scales fixed.

    Rows are independent. For each row the search visits every group, and in it every codebook, once, tries
    all K codes there in every hypothesis, and keeps the `beam` best, counting the error of the whole row.
    The order is random with a generator, else as it comes. What is there already is among the candidates,
    so with a beam of 1 no step can raise the error.

    >>> now = Additive(torch.zeros(1, 2, 1, dtype=torch.uint8), torch.tensor([[[0.0], [1.0]]]), torch.ones(1))
    >>> H = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> beam_search(torch.tensor([[0.7, 0.6]]), H, now, beam=2).flatten().tolist()
    [1, 0]
    """
    (M, K, g), d_out = now.codebooks.shape, len(W)
    rows = torch.arange(d_out, device=W.device)
    words = now.codebooks
    codes, left = now.codes.long()[None], (W - now.restore())[None]  # [beams, d_out, ...]
    losses = _square(left, H)
    for j in _order(now.codes.shape[1], generator):
        part = slice(j * g, (j + 1) * g)
        corner = H[part, part]
        for m in _order(M, generator):
            old = words[m][codes[:, :, j, m]] * now.scale[:, None]
            # The row without this codeword: its error, and how that pulls at the group's columns.
            without = left[..., part] + old
            pull = left @ H[:, part] + old @ corner
            error = losses + 2 * (pull * old).sum(-1) - _square(old, corner)
            gain = 2 * now.scale[:, None] * (pull @ words[m].T)
            cost = now.scale[:, None].square() * _square(words[m], corner)
            scores = error[..., None] - gain + cost  # [beams, d_out, K]
            flat = scores.transpose(0, 1).flatten(1)
            losses, best = flat.topk(min(beam, flat.shape[1]), largest=False)
            losses, source, word = losses.T, (best // K).T, (best % K).T  # [beams, d_out]
            codes, left, without = codes[source, rows], left[source, rows], without[source, rows]
            codes[:, :, j, m] = word
            left[..., part] = without - words[m][word] * now.scale[:, None]
    return codes[0].to(torch.uint8)


def _order(n: int, generator: torch.Generator | None) -> list[int]:
    return list(range(n)) if generator is None else torch.randperm(n, generator=generator).tolist()


def _square(rows: Tensor, H: Tensor) -> Tensor:
    """x H x' for every row x of [..., d]."""
    return ((rows @ H) * rows).sum(-1)


def _loss(W: Tensor, H: Tensor, found: Additive) -> float:
    return float(_square(W.double() - found.restore().double(), H.double()).sum()) / len(W)


def _checked(W: Tensor, H: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Both in float32; ValueError unless they are finite matrices that fit each other and the group."""
    if not W.is_floating_point() or W.ndim != 2 or W.numel() == 0 or not bool(W.isfinite().all()):
        raise ValueError(
            f"W must be a finite floating-point matrix [d_out, d_in], got {W.dtype} {list(W.shape)}"
        )
    d_in = W.shape[1]
    if H.shape != (d_in, d_in) or not bool(H.isfinite().all()):
        raise ValueError(f"H must be finite, [{d_in}, {d_in}] for W {list(W.shape)}, got {list(H.shape)}")
    if d_in % group:
        raise ValueError(f"group must be a divisor of d_in = {d_in}, got {group}")
    return W.detach().float().contiguous(), H.float()
