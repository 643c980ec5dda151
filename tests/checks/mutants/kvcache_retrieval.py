"""Plausible but wrong RetrievalAttention that its checks must reject."""

import torch

from refimpl.kvcache import retrieval
from refimpl.kvcache.indexes import Graph
from refimpl.kvcache.retrieval import RetrievalAttention, merge


class WindowAlone(RetrievalAttention):
    """The method switched off: nothing is retrieved."""

    def read(self, q, codec, scale, ok):
        super().read(q, codec, scale, ok)
        return retrieval.partial(q, codec.k[:, :, None], codec.v[:, :, None], scale)[0]


class HalfAndHalf(RetrievalAttention):
    """Both parts weigh the same: the log-sum-exps are left out."""

    def read(self, q, codec, scale, ok):
        real = retrieval.merge
        retrieval.merge = lambda o1, l1, o2, l2: (o1 + o2) / 2
        try:
            return super().read(q, codec, scale, ok)
        finally:
            retrieval.merge = real


def merged_the_wrong_way(o1, l1, o2, l2):
    return merge(o1, l2, o2, l1)


def mean_of_both(o1, l1, o2, l2):
    return (o1 + o2) / 2


class KeysAsTheirOwnQueries(Graph):
    """The graph is built for the keys' distribution, which hides that queries have another."""

    def build(self, keys, queries):
        super().build(keys, keys)


class NotConnected(Graph):
    """Keys that no query wanted stay without a way to them."""

    def build(self, keys, queries):
        super().build(keys, queries)
        self.links = torch.cat((self.links[..., : self.degree], torch.full_like(self.links[..., :1], -1)), -1)


MUTANTS = [
    ("retrieval_attention", "nothing is retrieved", WindowAlone),
    ("retrieval_attention", "the two parts are averaged", HalfAndHalf),
    ("retrieval_merge", "the log-sum-exps are swapped", merged_the_wrong_way),
    ("retrieval_merge", "the log-sum-exps are left out", mean_of_both),
    ("retrieval_graph", "keys are their own queries", KeysAsTheirOwnQueries),
    ("retrieval_graph", "some keys cannot be reached", NotConnected),
]
