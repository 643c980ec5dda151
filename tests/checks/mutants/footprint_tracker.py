"""Plausible but wrong live trackers that `check_live_tracker` must reject."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from refimpl.footprint.tracker import LiveTracker


class NothingIsRegistered(LiveTracker):
    def register(self, tensors, kind):
        super().register([t for t in tensors if not isinstance(t, Tensor)], kind)


class NothingDies(LiveTracker):
    def _free(self, key):
        pass


class StoragesToldApartByAddress(LiveTracker):
    """All fake storages have address 0."""

    def _see(self, storage, kind, relabel):
        address = storage.data_ptr() if storage.device.type != "meta" else 0
        known = any(ref() is not None and ref() is not storage and _address(ref()) == address
                    for _, _, ref in self._held.values())  # fmt: skip
        if not known:
            super()._see(storage, kind, relabel)


def _address(storage):
    return storage.data_ptr() if storage.device.type != "meta" else 0


class EveryOutputCounts(LiveTracker):
    """Views, results in place and all: what a sum of numel * itemsize over outputs gives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "view" in func.__name__ or func.__name__.endswith("_.Tensor"):
            for t in tree_leaves(out):
                self.live += t.numel() * t.itemsize
            self.peak = max(self.peak, self.live)
        return out


class ASliceIsItsElements(LiveTracker):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.slice.Tensor:
            lost = out.untyped_storage().nbytes() - out.numel() * out.itemsize
            self.live -= lost
            self.by_kind[self.new] -= lost
        return out


class OnlyTheFirstOutput(LiveTracker):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.live
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(out, tuple):
            self.live = before + out[0].untyped_storage().nbytes()
            self.peak = self.live
        return out


class PeakIsNotReset(LiveTracker):
    def reset_peak(self):
        if not hasattr(self, "peak"):
            super().reset_peak()


class PeakStartsAtZero(LiveTracker):
    def reset_peak(self):
        super().reset_peak()
        self.peak = 0


class GradientsStayTemporary(LiveTracker):
    def register(self, tensors, kind):
        super().register(tensors, "temp" if kind == "grad" else kind)


class CountedAgainWhenRegisteredAgain(LiveTracker):
    def register(self, tensors, kind):
        tensors = list(tensors)
        known = [t for t in tensors if isinstance(t, Tensor) and t.untyped_storage()._cdata in self._held]
        super().register(tensors, kind)
        self.live += sum(t.numel() * t.itemsize for t in known)


MUTANTS = [
    ("live_tracker", "switched off for what exists already", NothingIsRegistered),
    ("live_tracker", "storages never die", NothingDies),
    ("live_tracker", "storages are told apart by their address", StoragesToldApartByAddress),
    ("live_tracker", "views and results in place count again", EveryOutputCounts),
    ("live_tracker", "a slice holds its elements only", ASliceIsItsElements),
    ("live_tracker", "only the first output is counted", OnlyTheFirstOutput),
    ("live_tracker", "the peak is not reset", PeakIsNotReset),
    ("live_tracker", "the peak is reset to zero", PeakStartsAtZero),
    ("live_tracker", "gradients stay temporary", GradientsStayTemporary),
    ("live_tracker", "what is registered twice counts twice", CountedAgainWhenRegisteredAgain),
]
