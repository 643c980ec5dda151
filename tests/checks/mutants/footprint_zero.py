"""Plausible but wrong ZeRO that `check_zero` and its closed forms must reject."""

from math import ceil, prod

from refimpl.footprint.sharding import dim0_shard, zero_bytes
from refimpl.footprint.zero import Zero


class _Group:
    """The given ranks, with room for one broken collective."""

    def __init__(self, group):
        self.group, self.rank, self.world = group, group.rank, group.world

    def all_gather(self, full, chunk):
        self.group.all_gather(full, chunk)

    def reduce_scatter(self, chunk, full):
        self.group.reduce_scatter(chunk, full)


class _Replicas(_Group):
    """Every rank believes to be alone, but for the mean of the gradients."""

    def __init__(self, group):
        self.group, self.rank, self.world = group, 0, 1

    def all_gather(self, full, chunk):
        full.copy_(chunk)

    def reduce_scatter(self, chunk, full):
        everyone = full.new_empty(self.group.world * len(full))
        self.group.all_gather(everyone, full)
        chunk.copy_(everyone.view(self.group.world, -1).mean(0))


class _NoReduction(_Group):
    def reduce_scatter(self, chunk, full):
        chunk.copy_(full.chunk(self.world)[self.rank] * self.world)


class _SumForMean(_Group):
    def reduce_scatter(self, chunk, full):
        self.group.reduce_scatter(chunk, full * self.world)


def _over(broken):
    def make(model, *, group=None, **options):
        return Zero(model, group=group and broken(group), **options)

    return make


class StaleParameters(Zero):
    """The ranks update their chunks and forget to gather the others'."""

    def step(self):
        for unit in self.units:
            unit.collect = lambda: None
        super().step()
        for unit in self.units:
            del unit.collect


class LayersStayGathered(Zero):
    """Stage 3 without freeing after forward."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        for unit in self.units:
            unit.stays = True


class UncountedRoot(Zero):
    """Gathered parameters do not show in the ledger."""

    def ledger(self):
        ledger = super().ledger()
        return type(ledger)(tuple(item for item in ledger.items if item.kind != "temp"))


def optimizer_never_divided(parameters, stage, world, *, weight=4, grad=4, optim=8):
    zero_bytes(parameters, stage, world)
    return parameters * (weight + grad + optim)


def stage_one_divides_gradients(parameters, stage, world, *, weight=4, grad=4, optim=8):
    return zero_bytes(parameters, 2 if stage == 1 else stage, world, weight=weight, grad=grad, optim=optim)


def megatron_bytes_for_every_regime(parameters, stage, world, *, weight=4, grad=4, optim=8):
    return zero_bytes(parameters, stage, world, weight=2, grad=2, optim=12)


def rows_without_padding(shape, rank, world):
    own = dim0_shard(shape, rank, world)[1]
    return own, own


def elements_in_place_of_rows(shape, rank, world):
    dim0_shard(shape, rank, world)
    stored = ceil(prod(shape) / world)
    return stored, min(max(prod(shape) - rank * stored, 0), stored)


def nothing_chunked(shape, rank, world):
    dim0_shard(shape, rank, world)
    return prod(shape), prod(shape)


MUTANTS = [
    ("zero", "nothing is sharded: plain data parallelism", _over(_Replicas)),
    ("zero", "gradients are not reduced over ranks", _over(_NoReduction)),
    ("zero", "gradients are summed over ranks, which Adam's scaling all but hides", _over(_SumForMean)),
    ("zero", "updated chunks are not gathered", StaleParameters),
    ("zero", "stage 3 keeps the layers gathered until backward", LayersStayGathered),
    ("zero", "the gathered root is not counted", UncountedRoot),
    ("zero_bytes", "no stage divides anything", optimizer_never_divided),
    ("zero_bytes", "stage 1 divides the gradients already", stage_one_divides_gradients),
    ("zero_bytes", "2 + 2 + 12 bytes for every regime", megatron_bytes_for_every_regime),
    ("fsdp_shard", "the last rank's padding is not stored", rows_without_padding),
    ("fsdp_shard", "elements are chunked, not rows", elements_in_place_of_rows),
    ("fsdp_shard", "every rank keeps the whole tensor", nothing_chunked),
]
