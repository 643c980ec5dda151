"""ZeRO: AdamW training with optimizer states, gradients and parameters partitioned over N ranks.

Implements stages 1, 2 and 3 of Rajbhandari et al., arXiv 1910.02054 (§5), the sharding terms of survey Eq. 1.
Every rank trains on its own part of the batch; between the parts nothing but two collectives happens:

    reduce-scatter   rank r receives chunk r of the gradients' sum over ranks
    all-gather       every rank receives every rank's chunk of the parameters

Layout: the parameters of one *unit* (a decoder layer; the *root* unit holds the rest, tied embeddings among
it) are one flat buffer, padded to N chunks of c = ceil(P_unit / N) elements, of which rank r owns chunk r.
AdamW works element by element, so it cannot tell a chunk from a tensor: training is unchanged.

Simplified against production systems: nothing is prefetched or overlapped, and there is one dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.footprint.sharding import flat_shard, partition
from refimpl.footprint.worker import Group, Processes
from refimpl.ledger import Ledger, of_tensors

__all__ = ["Zero"]


class Zero:
    """AdamW over a model whose training state is partitioned over ranks.

    Implements ZeRO (arXiv 1910.02054; survey Eq. 1). Write the training loop as ever: forward, backward of
    the *mean* loss over this rank's part of the batch (parts of equal size), `step()`.

    - stage 1: gradients stay whole until `step`, the moments are sharded;
    - stage 2: each unit's gradients are reduce-scattered as soon as backward has them all;
    - stage 3: parameters are sharded too: a layer is gathered before its forward and again before its
      backward and freed after each; the root unit stays gathered from forward to the end of backward.

    Per rank, float32: 8P + 8P/N, 4P + 12P/N, 16P/N + gathered units (`refimpl.footprint.sharding`).

    Parameters
    ----------
    model : changed in place: its parameters become views of flat buffers. Equal on all ranks.
    stage : 1, 2 or 3.
    units : the modules sharded one by one, e.g. `model.model.layers`; not nested, without shared parameters.
    group : the ranks; default: torch.distributed's default process group.
    adamw : options of torch.optim.AdamW (lr, betas, eps, weight_decay), the same for all parameters.

    Raises ValueError for an unknown stage, nested units, frozen parameters, several dtypes, a parameter
    shared between units, and where the ranks start from different parameters; the model is then unchanged.

    Examples
    --------
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    >>> zero = Zero(model, stage=3, units=[model[1]])
    >>> model(torch.ones(2, 4)).mean().backward()
    >>> zero.ledger().by_kind()
    {'weight': 100, 'grad': 100}
    >>> zero.step()
    >>> zero.ledger().by_kind()  # two moments for each of 25 parameters, a step count for each of 2 units
    {'weight': 100, 'optim': 208}
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stage: int,
        units: Iterable[nn.Module],
        group: Group | None = None,
        **adamw: Any,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, got {stage!r}")
        owners = partition(model, list(units))
        torch.optim.AdamW([torch.zeros(1)], **adamw)  # refuses bad options before the model is touched
        self.stage, self.group = stage, group or Processes()
        self._require_equal_start(model)
        self.names = {p: name for name, p in model.named_parameters()}
        self.units = [_Unit(name, own, stage, self.group) for name, (_, own) in owners.items()]
        self.optimizer = torch.optim.AdamW([unit.shard for unit in self.units], **adamw)
        for unit, (module, _) in zip(self.units, owners.values(), strict=True):
            if stage >= 2:
                for p in unit.parameters:
                    p.register_post_accumulate_grad_hook(unit.reduce_once_complete)
            if stage == 3:
                module.register_forward_pre_hook(lambda *_, unit=unit: unit.gather())
                module.register_forward_hook(unit.after_forward)
                if module is not model:
                    module.register_full_backward_pre_hook(unit.before_backward)
                unit.stays = module is model
                unit.free()

    def step(self) -> None:
        """Update this rank's chunks with the ranks' mean gradient; the gradients are gone afterwards.

        Raises ValueError where a parameter has no gradient: a flat chunk is updated as a whole.
        """
        missing = [unit.name for unit in self.units if not unit.ready()]
        if missing:
            raise ValueError(f"parameters without a gradient in {', '.join(missing)}: run backward first")
        if self.stage == 1:
            for unit in self.units:
                unit.reduce()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for unit in self.units:
            unit.free() if self.stage == 3 else unit.collect()

    def full_parameters(self) -> dict[str, Tensor]:
        """Return a copy of every whole parameter by its name in the model; all ranks must call it."""
        whole = {}
        for unit in self.units:
            was_gathered = unit.gathered
            unit.gather()
            whole |= {self.names[p]: p.detach().clone() for p in unit.parameters}
            if not was_gathered:
                unit.free()
        return whole

    def ledger(self) -> Ledger:
        """Count what this rank holds now; stage 3's gathered units are "temp".

        Resident bytes include the padding (parameters, gradients), payload bytes do not.
        """
        shards = [(f"{u.name}.shard", u.shard) for u in self.units]
        views = [(self.names[p], p) for u in self.units if u.gathered for p in u.parameters]
        grads = [(self.names[p], p.grad) for u in self.units for p in u.parameters if p.grad is not None]
        grads += [(f"{u.name}.shard", u.shard.grad) for u in self.units if u.shard.grad is not None]
        state = self.optimizer.state
        states = [(f"{u.name}.{key}", value) for u in self.units for key, value in state[u.shard].items()]
        if self.stage == 3:
            weights = of_tensors(shards, "weight") + of_tensors(views, "temp")
        else:
            weights = of_tensors(views + shards, "weight")  # a shard is a view of its unit's full buffer
        return weights + of_tensors(grads, "grad") + of_tensors(states, "optim")

    def _require_equal_start(self, model: nn.Module) -> None:
        mine = torch.stack([p.detach().double().sum() for p in model.parameters()])
        everyone = mine.new_empty(self.group.world * len(mine))
        self.group.all_gather(everyone, mine)
        if not torch.equal(everyone, mine.repeat(self.group.world)):
            raise ValueError("model differs between the ranks: build it from one seed on all of them")


class _Unit:
    """Parameters that are flattened, gathered, reduced and freed together."""

    def __init__(self, name: str, parameters: list[nn.Parameter], stage: int, group: Group) -> None:
        self.name, self.parameters, self.stage, self.group = name, parameters, stage, group
        self.numel = sum(p.numel() for p in parameters)
        self.shapes = [p.shape for p in parameters]
        stored, own = flat_shard(self.numel, group.rank, group.world)
        self.flat = self._flattened([p.detach() for p in parameters])
        self.nbytes = self.flat.untyped_storage().nbytes()
        self.chunk = self.flat[group.rank * stored : (group.rank + 1) * stored]
        if stage == 3:
            self.chunk = self.chunk.clone()
        self.shard = nn.Parameter(self.chunk[:own])  # the last ranks' padding is stored, never updated
        self.stays = self.in_backward = False
        self._show()

    def _flattened(self, tensors: list[Tensor]) -> Tensor:
        flat = torch.cat([t.flatten() for t in tensors])
        stored, _ = flat_shard(self.numel, 0, self.group.world)
        return F.pad(flat, (0, self.group.world * stored - self.numel))

    def _show(self) -> None:
        """Let the model's parameters be views of the full buffer."""
        parts = self.flat[: self.numel].split([shape.numel() for shape in self.shapes])
        for p, part, shape in zip(self.parameters, parts, self.shapes, strict=True):
            p.data = part.view(shape)
        self.gathered = True

    def gather(self) -> None:
        """All-gather the parameters unless they are here."""
        if not self.gathered:
            self.flat.untyped_storage().resize_(self.nbytes)
            self.collect()
            self._show()

    def collect(self) -> None:
        """Fill the full buffer with every rank's chunk."""
        self.group.all_gather(self.flat.detach(), self.chunk)

    def free(self) -> None:
        """Drop the full parameters.

        The storage is emptied, not replaced: autograd has saved views of it for backward (the transposed
        weight of a linear layer), and these see the values again once `gather` has refilled it.
        """
        for p in self.parameters:
            p.data = p.data.new_empty(0)
        self.flat.untyped_storage().resize_(0)
        self.gathered = False

    def complete(self) -> bool:
        """Whether backward has given every parameter its gradient."""
        return all(p.grad is not None for p in self.parameters)

    def ready(self) -> bool:
        """Whether every gradient is where `step` needs it: whole at stage 1, else reduced."""
        if self.stage == 1:
            return self.complete()
        return self.shard.grad is not None and all(p.grad is None for p in self.parameters)

    def reduce(self) -> None:
        """Reduce-scatter the gradients: keep the ranks' mean of this rank's chunk, drop the rest."""
        full = self._flattened([p.grad for p in self.parameters])
        mean = torch.empty_like(self.chunk)
        self.group.reduce_scatter(mean, full)
        mean = mean.div_(self.group.world)[: len(self.shard)]
        self.shard.grad = mean if self.shard.grad is None else self.shard.grad.add_(mean)
        for p in self.parameters:
            p.grad = None

    def reduce_once_complete(self, _: nn.Parameter) -> None:
        if self.complete():
            self.reduce()
            self.in_backward = False
            if self.stage == 3:
                self.free()

    def after_forward(self, *_: object) -> None:
        # Under gradient checkpointing forward runs again inside backward, which then needs the parameters.
        if not (self.in_backward or (self.stays and torch.is_grad_enabled())):
            self.free()

    def before_backward(self, *_: object) -> None:
        self.in_backward = True
        self.gather()
