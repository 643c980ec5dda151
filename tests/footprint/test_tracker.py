"""The live tracker agrees with hand counts, with torch's own tracker, and with itself on fake tensors."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint.checkpointing import checkpoint_layers
from refimpl.footprint.tracker import LiveTracker


def _prepared(family, seed=0):
    """A model, its optimizer after one step, a batch, and the next step as a function."""
    model = tiny(family, seed=seed).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = random_ids(2, 16)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return model, optimizer, ids, step


def _tracked(family, fake):
    with FakeTensorMode() if fake else nullcontext():
        model, optimizer, ids, step = _prepared(family)
        with LiveTracker() as tracker:
            tracker.watch(model, optimizer)
            tracker.register([ids], "activation")
            tracker.reset_peak()
            step()
    return tracker


@pytest.mark.parametrize(("family", "checkpointed"), [("gpt2", False), ("llama", False), ("llama", True)])
def test_total_equals_that_of_torchs_mem_tracker(family, checkpointed):
    peer = pytest.importorskip("torch.distributed._tools.mem_tracker")  # private: it may move
    totals = []
    for which in ("ours", "peer"):
        model, optimizer, ids, step = _prepared(family)
        with checkpoint_layers(model) if checkpointed else nullcontext():
            if which == "ours":
                with LiveTracker() as tracker:
                    tracker.watch(model, optimizer)
                    tracker.register([ids], "activation")
                    step()
                totals.append((tracker.peak, tracker.live))
            else:
                tracker = peer.MemTracker()
                tracker.track_external(model, optimizer, ids)
                with tracker:
                    step()
                cpu = torch.device("cpu")
                totals.append(
                    tuple(tracker.get_tracker_snapshot(t)[cpu]["Total"] for t in ("peak", "current"))
                )
    assert totals[0] == totals[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_real_equals_fake(family):
    real, fake = _tracked(family, fake=False), _tracked(family, fake=True)
    assert real.peak == fake.peak > real.live == fake.live
    assert real.at_peak == fake.at_peak


def test_the_same_program_has_the_same_result_with_and_without_it():
    plain, tracked = _prepared("llama"), _prepared("llama")
    plain[-1]()
    with LiveTracker() as tracker:
        tracker.watch(*tracked[:2])
        tracked[-1]()
    for a, b in zip(plain[0].parameters(), tracked[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_after_the_step_static_terms_and_the_batch_remain():
    model, optimizer, ids, step = _prepared("llama")
    with LiveTracker() as tracker:
        tracker.watch(model, optimizer)
        tracker.register([ids], "activation")
        step()
    weights = sum(p.numel() * 4 for p in model.parameters())
    optim = 2 * weights + 4 * len(list(model.parameters()))
    buffers = sum(b.numel() * 4 for b in model.buffers())
    kinds = {kind: size for kind, size in tracker.by_kind.items() if size}
    assert kinds == {"weight": weights, "buffer": buffers, "optim": optim, "activation": ids.numel() * 8}


def test_the_timeline_rises_to_the_peak_and_names_operations():
    tracker = _tracked("gpt2", fake=True)
    assert max(size for _, size in tracker.timeline) == tracker.peak
    names = [name for name, _ in tracker.timeline]
    assert "addmm.default" in names and not any(name.startswith("device") for name in names)


def test_a_storage_that_grows_in_place_is_counted_anew():
    with LiveTracker() as tracker:
        x = torch.empty(10)
        x.resize_(1000)
    assert (tracker.live, tracker.peak) == (4000, 4000)
    x = None
    assert tracker.live == 0


def test_a_freed_address_may_be_used_again():
    with LiveTracker() as tracker:
        for _ in range(50):
            torch.zeros(1000)
    assert (tracker.live, tracker.peak) == (0, 4000)


def test_a_wrapper_subclass_counts_as_its_inner_tensors():
    with LiveTracker() as tracker:
        tracker.register([_Halved(torch.zeros(1000, dtype=torch.bfloat16))], "weight")
    assert tracker.peak == 2000
    half = _Halved(torch.zeros(1000, dtype=torch.bfloat16))
    with LiveTracker() as tracker:
        tracker.register([half], "weight")
        doubled = half * 2  # unwrapped: one bfloat16 result
    assert doubled.dtype == torch.bfloat16
    assert (tracker.live, tracker.peak) == (4000, 4000)


def test_new_storages_have_the_kind_that_is_set_and_keep_it():
    with LiveTracker() as tracker:
        tracker.new = "kv"
        x = torch.zeros(10)
        tracker.new = "temp"
        x.add_(1)
        assert tracker.by_kind["kv"] == 40 == tracker.live
        tracker.register([x], "index")
    assert tracker.by_kind["kv"] == 0 and tracker.by_kind["index"] == 40 == tracker.live


def test_nothing_stays_on_model_and_optimizer_after_an_error():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="stop"), LiveTracker() as tracker:
        tracker.watch(model, optimizer)
        raise RuntimeError("stop")
    assert not optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("tensors", "kind", "error", "message"),
    [
        ([torch.zeros(3)], "wieght", ValueError, "kind must be one of weight, .*, got 'wieght'"),
        ([torch.zeros(3), 3.0], "weight", TypeError, "tensors must hold tensors, got float"),
        ([None], "grad", TypeError, "got NoneType"),
    ],
)
def test_bad_input_is_refused_before_anything_is_counted(tensors, kind, error, message):
    tracker = LiveTracker()
    with pytest.raises(error, match=message):
        tracker.register(tensors, kind)
    assert tracker.live == tracker.peak == 0


class _Halved(Tensor):
    """Shows itself as float32 and holds bfloat16; computes in bfloat16."""

    @staticmethod
    def __new__(cls, half):
        return Tensor._make_wrapper_subclass(cls, half.shape, dtype=torch.float32)

    def __init__(self, half):
        self.half_ = half

    def __tensor_flatten__(self):
        return ["half_"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return _Halved(inner["half_"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(a.half_ if isinstance(a, cls) else a for a in args), **(kwargs or {}))
