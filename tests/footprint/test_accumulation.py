"""Gradient accumulation: exactly the full batch's gradient, at the price of one gradient copy."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.footprint.accumulation import accumulate, count_targets, split


def _batch(rows=5, length=12):
    """Rows with 11, 9, 7 ... targets: a masked prompt on the left, padding on the right."""
    ids = random_ids(rows, length)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = -100
        labels[row, length - row :] = -100
    return {"input_ids": ids, "labels": labels}


def _gradients(model, micro_batches):
    model.zero_grad()
    loss = accumulate(model, micro_batches)
    return loss, [p.grad.clone() for p in model.parameters()]


def _furthest(actual, expected):
    return max((a - b).abs().max().item() for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_cut_gives_the_gradient_of_the_full_batch(family):
    model, batch = tiny(family), _batch()
    whole = model(**batch).loss
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for parts in (1, 2, 3, 5):
        loss, gradients = _gradients(model, split(batch, parts))
        assert _furthest(gradients, expected) < 1e-6
        torch.testing.assert_close(loss, whole.detach())


def test_the_mean_of_means_is_another_gradient():
    model, batch = tiny("llama"), _batch()
    _, expected = _gradients(model, [batch])
    model.zero_grad()
    for part in split(batch, 5):
        (model(**part).loss / 5).backward()
    assert _furthest([p.grad for p in model.parameters()], expected) > 1e-3
    even = {
        "input_ids": batch["input_ids"],
        "labels": batch["input_ids"],
    }  # equal counts: the trap is invisible
    _, expected = _gradients(model, [even])
    model.zero_grad()
    for part in split(even, 5):
        (model(**part).loss / 5).backward()
    assert _furthest([p.grad for p in model.parameters()], expected) < 1e-6


def test_a_micro_batch_without_targets_adds_nothing():
    model, batch = tiny("gpt2"), _batch()
    _, expected = _gradients(model, [batch])
    silent = {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], -100)}
    loss, gradients = _gradients(model, [batch, silent])
    assert loss.isfinite() and _furthest(gradients, expected) == 0


def test_gradients_add_to_what_is_there_as_backward_does():
    model, batch = tiny("gpt2"), _batch()
    _, once = _gradients(model, [batch])
    accumulate(model, [batch])
    assert _furthest([p.grad for p in model.parameters()], [2 * g for g in once]) < 1e-6


class Live(TorchDispatchMode):
    """Peak bytes of live storages: those given, and those that ops make."""

    def __init__(self, *given):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()
        for tensor in given:
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


def _peak(family, attention, parts):
    """Peak of the forward and backward passes over `parts` times the same micro-batch of [2, 32] tokens."""
    model = tiny(family, attention=attention, vocab_size=1024)  # the logits make the peak early in backward
    ids = random_ids(2, 32)
    live = Live(*model.parameters(), *model.buffers(), ids)
    with live:
        accumulate(model, parts * [{"input_ids": ids, "labels": ids}])
    return live.peak, sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_from_the_second_micro_batch_on_the_peak_is_one_gradient_copy_higher(family, attention):
    one, gradients = _peak(family, attention, 1)
    assert [_peak(family, attention, parts)[0] - one for parts in (2, 3, 4)] == 3 * [gradients]


def test_a_peak_at_the_end_of_backward_rises_by_less():
    model, ids = tiny("llama", vocab_size=1024), random_ids(1, 2)
    peaks = []
    for parts in (1, 2, 3):
        model.zero_grad()
        live = Live(*model.parameters(), *model.buffers(), ids)
        with live:
            accumulate(model, parts * [{"input_ids": ids, "labels": ids}])
        peaks.append(live.peak)
    assert 0 < peaks[1] - peaks[0] < sum(p.numel() * 4 for p in model.parameters()) and peaks[1] == peaks[2]


def test_split_keeps_every_row_in_order():
    batch = _batch(5)
    parts = split(batch, 3)
    assert [len(part["labels"]) for part in parts] == [2, 2, 1]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in batch)
    assert sum(count_targets(part) for part in parts) == count_targets(batch) == 11 + 9 + 7 + 5 + 3


def test_bad_input_is_refused_before_any_gradient():
    model, batch = tiny("gpt2"), _batch()
    silent = {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], -100)}
    bad = [
        ([], ValueError, "at least one micro-batch"),
        ([batch, {"input_ids": batch["input_ids"]}], ValueError, "'labels'"),
        ([batch, {"labels": batch["labels"][0]}], ValueError, "'labels'"),
        ([silent, silent], ValueError, "at least one label"),
        (iter([batch]), TypeError, "list or tuple"),
        (batch, TypeError, "list or tuple"),
    ]
    for micro_batches, error, message in bad:
        with pytest.raises(error, match=message):
            accumulate(model, micro_batches)
    assert all(p.grad is None for p in model.parameters())
    for parts in (0, 6, 2.0):
        with pytest.raises(ValueError, match="parts must be an integer in 1..5"):
            split(batch, parts)
    with pytest.raises(ValueError, match="equally many rows"):
        split(batch | {"attention_mask": torch.ones(4, 12)}, 2)
