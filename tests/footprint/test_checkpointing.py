"""Gradient checkpointing: the same gradients, the bytes of the closed forms, one more forward of FLOPs."""

import weakref
from functools import partial
from importlib.metadata import version
from itertools import product

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from refimpl.checks.footprint.checkpointing import check_gradient_checkpointing
from refimpl.checks.tiny import HEADS, LAYERS, VOCAB, WIDTH, random_ids, tiny
from refimpl.footprint import checkpointing
from refimpl.footprint.checkpointing import (
    backward_bytes,
    best_every,
    block_sizes,
    checkpoint,
    checkpoint_attention,
    checkpoint_layers,
    kept_bytes,
)

B, S = 2, 16
N = B * S
BOUNDARY = N * WIDTH * 4
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = ("gpt2", "llama")


def _model(family, attention="eager", **changes):
    changes = (NO_DROPOUT | changes) if family == "gpt2" else changes
    return tiny(family, attention=attention, **changes).train()


def _outside(family):
    """Bytes saved outside the layers, when cos and sin are not (the layers that save them are recomputed)."""
    if family == "gpt2":
        return 4 * N * (2 * WIDTH + 2) + 4 * N * VOCAB + 16 * N + 8 * S + 4
    return 4 * N * (3 * WIDTH + 1) + 4 * N * VOCAB + 16 * N + 4


def _layer(family, model, attention):
    """Bytes that one layer saves: eager, sdpa, or eager with the core recomputed ("selective")."""
    h, f, kv = WIDTH, model.config.intermediate_size if family == "llama" else 0, 2 * WIDTH // HEADS
    square = {"eager": HEADS * S, "sdpa": HEADS, "selective": 0}[attention]
    if family == "gpt2":
        scale = version("transformers").startswith(("5.2.", "5.3.")) and attention == "eager"  # then a tensor
        return 4 * N * (28 * h + 4 + square) + 4 * scale
    return 4 * N * ((10 * h if attention == "eager" else 8 * h + 2 * kv) + 4 * f + square + 2)


def _forward(model, ids, **kwargs):
    """The loss, and the unique bytes of storage that autograd saved for it, weights not among them."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False, **kwargs).loss
    return loss, sum(storage.nbytes() for storage in kept.values())


def _step(model, seed=0):
    """Saved bytes and gradients."""
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss, saved = _forward(model, random_ids(B, S))
        loss.backward()
    return saved, [p.grad for p in model.parameters()]


def _flops(model):
    """FLOPs of the backward pass (counting takes ops apart and moves last bits: not for gradients)."""
    model.zero_grad()
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as flops:
        loss = _forward(model, random_ids(B, S))[0]
        forward = flops.get_total_flops()
        loss.backward()
    return flops.get_total_flops() - forward


def _same(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class Live(TorchDispatchMode):
    """Bytes of the storages that ops made while `counting`, and that are alive `now`."""

    def __init__(self, parameters):
        super().__init__()
        self.now, self.counting = 0, True
        self.seen = {p.untyped_storage()._cdata for p in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.counting:
            storage = out.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.seen:
                self.seen.add(key)
                self.now += size
                weakref.finalize(storage, self._drop, key, size)
        return out

    def _drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("every", (1, 2, 3))
@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_give_the_same_gradients_and_save_the_closed_form_to_the_byte(family, attention, every):
    model = _model(family, attention)
    plain, gradients = _step(model)
    with checkpoint_layers(model, every=every):
        saved, again = _step(model)
    assert _same(again, gradients)
    assert saved == kept_bytes(LAYERS, every, BOUNDARY) + _outside(family)
    rope = 0 if family == "gpt2" else 2 * S * (WIDTH // HEADS) * 4
    assert plain == LAYERS * _layer(family, model, attention) + _outside(family) + rope


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_the_attention_core_leaves_what_grows_linearly(family):
    model = _model(family)
    gradients, flops = _step(model)[1], _flops(model)
    with checkpoint_attention(model):
        (saved, again), more = _step(model), _flops(model)
    rope = 0 if family == "gpt2" else 2 * S * (WIDTH // HEADS) * 4
    assert _same(again, gradients)
    assert saved == LAYERS * _layer(family, model, "selective") + _outside(family) + rope
    assert more - flops == LAYERS * 4 * B * S * S * WIDTH  # Q K^T and P V


@pytest.mark.parametrize("every", (1, 2))
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_computes_one_more_forward_of_the_layers_and_nothing_else(family, every):
    model = _model(family)
    flops = _flops(model)
    with checkpoint_layers(model, every=every):
        more = _flops(model)
    names = ("ln", "norm", "wte", "wpe", "embed", "bias")
    matrices = sum(p.numel() for n, p in model.named_parameters() if not any(x in n for x in names))
    assert more - flops == 2 * N * matrices + LAYERS * 4 * B * S * S * WIDTH


@pytest.mark.parametrize("family", FAMILIES)
def test_torchs_checkpoint_gives_the_same_gradients_and_bytes_and_spares_the_last_matmul(family, monkeypatch):
    model = _model(family, **({"resid_pdrop": 0.3, "attn_pdrop": 0.3} if family == "gpt2" else {}))
    with checkpoint_layers(model, every=2):
        (saved, gradients), flops = _step(model), _flops(model)

    def peer(function, *inputs):
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)

    monkeypatch.setattr(checkpointing, "checkpoint", peer)
    with checkpoint_layers(model, every=2):
        (saved_peer, gradients_peer), flops_peer = _step(model), _flops(model)
    assert saved == saved_peer and _same(gradients, gradients_peer)
    last = 2 * N * WIDTH * (4 * WIDTH if family == "gpt2" else model.config.intermediate_size)
    assert flops - flops_peer == (0 if family == "gpt2" else len(block_sizes(LAYERS, 2)) * last)


def test_torchs_checkpoint_passes_our_check(capsys):
    check_gradient_checkpointing(partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_switch_of_transformers_does_nothing_in_eval_mode(family, attention):
    model = _model(family, attention)
    plain, gradients = _step(model)
    with checkpoint_layers(model):
        ours, _ = _step(model.eval())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert _step(model.eval())[0] == plain
    theirs, again = _step(model.train())
    # GPT-2 hands its eager mask [B, 1, S, S] to a layer by position, so hooks see it; ours closes over it
    mask = 4 * B * S * S if (family, attention) == ("gpt2", "eager") else 0
    assert theirs == ours + mask < plain and _same(again, gradients)


def test_dropout_is_repeated_and_later_draws_are_not_disturbed():
    model = _model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    _, gradients = _step(model)
    for context in (checkpoint_layers(model, every=2), checkpoint_attention(model)):
        with context:
            assert _same(_step(model)[1], gradients)
    assert not _same(_step(model, seed=1)[1], gradients)
    x = torch.ones(50, requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = checkpoint(lambda x: nn.functional.dropout(x * x, 0.5).sum(), x)
        torch.rand(3)  # the state that backward finds is not that of the block
        expected = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), expected)


def test_backward_may_come_after_the_context():
    model = _model("llama")
    _, gradients = _step(model)
    model.zero_grad()
    with checkpoint_layers(model, every=2):
        loss = _forward(model, random_ids(B, S))[0]
    loss.backward()
    assert _same([p.grad for p in model.parameters()], gradients)


def test_autocast_of_the_first_run_holds_in_the_second():
    model, ids = _model("llama"), random_ids(B, S)

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()  # outside, as is usual
        return [p.grad for p in model.parameters()]

    expected = gradients()
    with checkpoint_layers(model):
        assert _same(gradients(), expected)


def test_fake_tensors_are_checkpointed_like_real_ones():
    with FakeTensorMode():
        x, w = torch.ones(4, 8), torch.ones(8, 8, requires_grad=True)
        checkpoint(lambda x: nn.functional.dropout(x @ w, 0.5).exp().sum(), x).backward()
        assert w.grad.shape == (8, 8)


def test_nested_blocks_second_backward_and_gradients_by_autograd_grad():
    w = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x = torch.ones(2, 4)  # needs no gradient itself: frozen embeddings below trained layers

    def inner(x):
        return (x @ w).sin()

    def outer(x, scale):
        return (checkpoint(inner, x).exp() * scale).sum()

    (expected,) = torch.autograd.grad((inner(x).exp() * 2.0).sum(), w)
    loss = checkpoint(outer, x, 2.0)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(loss, w, retain_graph=True)[0], expected)
    with torch.no_grad():
        assert not checkpoint(outer, x, 2.0).requires_grad


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 6])
def test_live_bytes_in_backward_peak_at_the_closed_form_to_the_byte(every):
    layers, width, rows = 6, 64, 8
    weights = [torch.full((width,), 0.9, requires_grad=True) for _ in range(layers)]
    boundary = rows * width * 4
    layer = 3 * boundary  # sin saves x, cos saves sin x, exp and the product both save exp
    live, samples = Live(weights), []

    def block(x, first, last):
        live.counting = True
        for w in weights[first:last]:
            x = x.sin().cos().exp() * w
        live.counting = False  # gradients are made outside the blocks
        samples.append(live.now)
        return x

    with live:
        x, first = torch.ones(rows, width, requires_grad=True), 0
        for size in block_sizes(layers, every):
            x = checkpoint(block, x, first, first + size)
            first += size
        loss = x.sum()
        del x
        assert live.now == kept_bytes(layers, every, boundary)
        samples.clear()
        loss.backward()
        del loss
    assert live.now == 0
    assert len(samples) == len(block_sizes(layers, every))  # each block runs once more
    assert max(samples) == backward_bytes(layers, every, boundary, layer) + boundary  # and the block's output


def _compositions(layers):
    for cuts in product((False, True), repeat=layers - 1):
        sizes = [1]
        for cut in cuts:
            sizes[-1:] = [sizes[-1], 1] if cut else [sizes[-1] + 1]
        yield sizes


@pytest.mark.parametrize("ratio", [1, 2, 3.5, 8, 20, 60])
def test_best_every_is_the_minimum_of_a_simulated_backward_pass(ratio):
    boundary, layer = 10, int(10 * ratio)

    def simulate(sizes):
        peaks, alive = [], [boundary] * len(sizes)
        for size in reversed(sizes):
            peaks.append(sum(alive) + size * layer - boundary)
            alive.pop()
        return max(peaks)

    for layers in range(1, 41):
        cost = {every: simulate(block_sizes(layers, every)) for every in range(1, layers + 1)}
        assert all(cost[every] == backward_bytes(layers, every, boundary, layer) for every in cost)
        best = best_every(layers, boundary, layer)
        assert cost[best] == min(cost.values())
        assert all(every <= best for every in cost if cost[every] == cost[best])
        # never below the real-valued optimum by more than the blocks already freed
        assert cost[best] >= 2 * (layers * layer * boundary) ** 0.5 - 2 * boundary
    for layers in range(1, 10):  # of all ways to cut, blocks of equal size lose less than one layer
        free = min(simulate(sizes) for sizes in _compositions(layers))
        assert 0 <= simulate(block_sizes(layers, best_every(layers, boundary, layer))) - free <= layer


def test_best_every_is_about_the_square_root_when_a_layer_saves_only_its_input():
    for layers in (16, 36, 64, 100, 400):
        best = backward_bytes(layers, best_every(layers, 1, 1), 1, 1)
        assert best <= backward_bytes(layers, round(layers**0.5), 1, 1) == 2 * layers**0.5 - 1


@pytest.mark.parametrize("family", ("gpt2", "llama", "mistral", "qwen2"))
def test_contexts_restore_the_model(family):
    model = _model(family)
    before = (model.config.use_cache, [vars(m).keys() for m in model.modules()], list(model.state_dict()))
    with pytest.raises(KeyError), checkpoint_layers(model, every=2), checkpoint_attention(model):
        assert list(model.state_dict()) == before[2]
        assert _step(model)[0] < _step_plain(family)
        raise KeyError
    after = (model.config.use_cache, [vars(m).keys() for m in model.modules()], list(model.state_dict()))
    assert after == before and _step(model)[0] == _step_plain(family)


def _step_plain(family):
    return _step(_model(family))[0]


def test_another_model_is_untouched_by_checkpoint_attention():
    model, other = _model("gpt2"), _model("llama")
    plain = _step(other)[0]
    with checkpoint_attention(model):
        assert _step(other)[0] == plain


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bad_input_is_refused_and_nothing_changes():
    model = _model("gpt2", "sdpa")
    for every in (0, LAYERS + 1, 1.5):
        with pytest.raises(ValueError, match="every must be an integer in 1..3"):
            checkpoint_layers(model, every).__enter__()
    with pytest.raises(ValueError, match="'eager', got 'sdpa'"):
        checkpoint_attention(model).__enter__()
    for context in (checkpoint_layers, checkpoint_attention):
        with pytest.raises(TypeError, match="gpt2, llama, mistral, qwen2 .*got Linear"):
            context(nn.Linear(2, 2)).__enter__()
    with checkpoint_layers(model):
        with pytest.raises(ValueError, match="use_cache"):
            model(random_ids(1, 4), use_cache=True)
        with pytest.raises(ValueError, match="already"):
            checkpoint_layers(model).__enter__()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="already"):
        checkpoint_layers(model).__enter__()
    assert not any("forward" in vars(m) for m in model.modules()) and model.config.use_cache
    eager = _model("gpt2")
    with checkpoint_attention(eager), pytest.raises(ValueError, match="active"):
        checkpoint_attention(eager).__enter__()
    with pytest.raises(TypeError, match="function"):
        checkpoint(3, torch.ones(1))
    with pytest.raises(ValueError, match="at least one tensor"):
        checkpoint(torch.sin)
    with pytest.raises(ValueError, match="boundary must be in 1..layer"):
        backward_bytes(4, 2, 11, 10)


def test_a_function_that_saves_something_else_the_second_time_is_refused():
    runs = []

    def fickle(x):
        runs.append(1)
        return (x.sin() if len(runs) == 1 else x.exp().exp()).sum()

    loss = checkpoint(fickle, torch.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="second run"):
        loss.backward()
