"""Plausible but wrong AQLM that its check must reject."""

from dataclasses import replace

import torch

from refimpl.quantization.aqlm import AQLM


class Off(AQLM):
    """Residual k-means and nothing else."""

    def solve(self, W, H, generator=None):
        found, losses = replace(self, epochs=0).solve(W, H) if self.epochs else super().solve(W, H)
        return found, losses * (1 + 2 * self.epochs)


class WeightError(AQLM):
    """Minimises ||W - W^||, whatever the inputs."""

    def solve(self, W, H, generator=None):
        return super().solve(W, torch.eye(len(H)), generator)


class GroupsAlone(AQLM):
    """Every group is searched as if the others were exact."""

    def solve(self, W, H, generator=None):
        blocks = torch.block_diag(*[torch.ones(self.group, self.group)] * (len(H) // self.group))
        return super().solve(W, H * blocks, generator)


class FrozenCodebooks(AQLM):
    def solve(self, W, H, generator=None):
        return replace(self, steps=0).solve(W, H) if self.steps else super().solve(W, H)


class NoScale(AQLM):
    """k-means of the weights as they are."""

    def solve(self, W, H, generator=None):
        size = W.norm(dim=1, keepdim=True)
        found, losses = super().solve(W / size * size.mean(), H, generator)
        return found._replace(scale=found.scale * (size[:, 0] / size.mean()) ** 0.5), losses


class GreedyWhateverTheBeam(AQLM):
    def solve(self, W, H, generator=None):
        return replace(self, beam=1).solve(W, H) if self.beam > 1 else super().solve(W, H)


MUTANTS = [
    ("aqlm", "residual k-means alone", Off),
    ("aqlm", "the error of the weights is minimised", WeightError),
    ("aqlm", "a group's error does not count with that of the others", GroupsAlone),
    ("aqlm", "codebooks and scales are never trained", FrozenCodebooks),
    ("aqlm", "scales are not the norms of the rows", NoScale),
    ("aqlm", "greedy search, whatever the beam", GreedyWhateverTheBeam),
]
