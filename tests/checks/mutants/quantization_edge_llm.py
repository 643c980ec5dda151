"""Plausible but wrong EDGE-LLM that its checks must reject."""

import torch

from refimpl.backbone import Backbone
from refimpl.quantization.edge_llm import pruning_ratios
from refimpl.quantization.edge_llm_tuning import EarlyExits


def uniform(sensitivity, target):
    return (target,) * len(sensitivity)


def not_clipped(sensitivity, target):
    """The authors' code: ratios may exceed 1."""
    s = torch.as_tensor(sensitivity).double()
    if s.min() == s.max():
        return uniform(s, target)
    w = 1 - (s - s.min()) / (s.max() - s.min())
    return tuple((w / w.sum() * target * len(s)).tolist())


def clipped_only(sensitivity, target):
    """What is clipped goes to nobody: the mean is missed."""
    return tuple(min(ratio, 0.95) for ratio in not_clipped(sensitivity, target))


def upside_down(sensitivity, target):
    return pruning_ratios(-torch.as_tensor(sensitivity), target)


class Whole(EarlyExits):
    """Switched off: no early exits and no windows, the whole model is tuned at every step."""

    def window(self, e):
        return range(self.n_exits * self.stride)

    def forward(self, ids):
        with torch.no_grad():
            bb = Backbone(self.model)
            return [self._read(bb, self.hidden(ids, e), e) for e in range(self.n_exits)]


class WithoutNorm(EarlyExits):
    """The authors' code: the head reads the residual itself."""

    def _read(self, bb, x, e):
        return self.heads[e](x)


class NotRestarted(EarlyExits):
    """One stream with the factors of all blocks, instead of one that starts anew behind each exit."""

    def forward(self, ids):
        bb = Backbone(self.model)
        x, positions = self._start(bb, ids)
        found = []
        with torch.no_grad():
            for e in range(self.n_exits):
                x = self._blocks(bb, x, positions, self.window(e))
                found.append(self._read(bb, x, e))
        return found


class AllBelow(EarlyExits):
    """All blocks up to the exit have their factors and a graph: the depth of backpropagation is not cut."""

    def hidden(self, ids, e):
        bb = Backbone(self.model)
        x, positions = self._start(bb, ids)
        return self._blocks(bb, x, positions, range(self.window(e).stop))


class OneHead(EarlyExits):
    """Every exit reads the first head."""

    def _read(self, bb, x, e):
        return self.heads[0](bb.ln_final(x))


def no_vote(logits):
    """Switched off: the last exit speaks alone."""
    return logits[-1].softmax(-1)


def mean_vote(logits):
    return torch.stack([one.softmax(-1) for one in logits]).mean(0)


def vote_of_logits(logits):
    return torch.stack(list(logits)).amax(0).softmax(-1)


def not_renormalised(logits):
    return torch.stack([one.softmax(-1) for one in logits]).amax(0)


MUTANTS = [
    ("edge_llm_ratios", "off: the same ratio for all", uniform),
    ("edge_llm_ratios", "ratios above 1 are not clipped", not_clipped),
    ("edge_llm_ratios", "clipped, and the mean is missed", clipped_only),
    ("edge_llm_ratios", "sensitive blocks are pruned most", upside_down),
    ("edge_llm", "off: the whole model is tuned, and every exit is its end", Whole),
    ("edge_llm", "exits skip the final norm", WithoutNorm),
    ("edge_llm", "the stream with factors is not restarted", NotRestarted),
    ("edge_llm", "the graph reaches the first block", AllBelow),
    ("edge_llm", "one head for all exits", OneHead),
    ("edge_llm_vote", "off: the last exit alone", no_vote),
    ("edge_llm_vote", "the mean of the exits", mean_vote),
    ("edge_llm_vote", "the largest logit", vote_of_logits),
    ("edge_llm_vote", "not renormalised", not_renormalised),
]
