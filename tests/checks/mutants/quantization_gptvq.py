"""Plausible but wrong GPTVQ that its check must reject."""

from dataclasses import replace

import torch

from refimpl.quantization.codebooks import nearest
from refimpl.quantization.gptvq import GPTVQ, VectorQuantized


class Off(GPTVQ):
    """Vector quantization of the weights as they are."""

    def solve(self, W, H):
        books = super().solve(W, H).books
        points, book = W.reshape(1, -1, self.vdim), books.dense()[:, 0, 0].double()
        codes = nearest(points, book, torch.eye(self.vdim).double()[None])
        return VectorQuantized(codes.view(len(W), -1, 1).to(torch.uint8), books)


class Diagonal(GPTVQ):
    """The rule of the authors' code."""

    def solve(self, W, H):
        return replace(self, exact=False).solve(W, H) if self.exact else super().solve(W, H)


class DiagonalMetric(GPTVQ):
    """Exact feedback, but codes and centroids by the diagonal."""

    def _metric(self, corner, clustering=False):
        return corner.diagonal().pow(-2).diag()


class PlainKMeans(GPTVQ):
    def _metric(self, corner, clustering=False):
        return torch.eye(self.vdim).to(corner) if clustering else super()._metric(corner)


class NoUpdate(GPTVQ):
    def solve(self, W, H):
        return replace(self, update=False).solve(W, H) if self.update else super().solve(W, H)


class UpdateOfTheWeights(GPTVQ):
    """The codebook moves to the means of the weights, not of the outputs."""

    def solve(self, W, H):
        found = super().solve(W, H)
        if not self.update:
            return found
        points = W.reshape(1, -1, self.vdim)
        book = found.books.dense()[:, 0, 0].double()
        means = torch.stack(
            [
                points[0][found.codes.flatten() == k].mean(0) if (found.codes == k).any() else book[0, k]
                for k in range(book.shape[1])
            ]
        )
        return VectorQuantized(found.codes, type(found.books).store(means[None, None, None], self.store))


MUTANTS = [
    ("gptvq", "no feedback: nearest centroids of the weights", Off),
    ("gptvq", "the block's factor counts as its diagonal", Diagonal),
    ("gptvq", "distances ignore the coupling within a vector", DiagonalMetric),
    ("gptvq", "k-means in the plain metric", PlainKMeans),
    ("gptvq", "codebooks are never moved", NoUpdate),
    ("gptvq", "codebooks are moved towards the weights", UpdateOfTheWeights),
]
