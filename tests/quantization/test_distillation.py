"""Distillation: the losses, what trains and what does not, stored teachers, students of half the layers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.lora import add_lora
from refimpl.quantization import RTN, compress_model
from refimpl.quantization.distillation import (
    Distillation,
    TopK,
    distil,
    feature_loss,
    half_depth,
    kd_loss,
    kl_loss,
    layer_map,
    store,
    top_k,
)
from refimpl.quantization.pruning.slicing import slice_model
from refimpl.training import IGNORE, TrainConfig, lm_loss, targets, train

V = 13
DIRECTIONS = ("forward", "reverse")


def normal(*shape, seed=0, dtype=torch.float32):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_targets():
    found = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(1))
    found[0, :2] = found[2, 3:] = IGNORE
    return found


def config(steps=4, **changes):
    return TrainConfig(**({"steps": steps, "batch": 4, "lr": 3e-3, "warmup": 1} | changes))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


# --- losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("T", [1.0, 2.5])
def test_the_kl_is_torchs_and_zero_for_itself(direction, T):
    z_s, z_t, labels = normal(3, 5, V), normal(3, 5, V, seed=1), some_targets()
    rows = labels != IGNORE
    log_q, log_p = F.log_softmax(z_s / T, -1)[rows], F.log_softmax(z_t / T, -1)[rows]
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    expected = T**2 * F.kl_div(first, second, reduction="batchmean", log_target=True)  # input: the student's
    torch.testing.assert_close(kl_loss(z_s, z_t, labels, temperature=T, direction=direction), expected)
    assert abs(kl_loss(z_t, z_t, labels, temperature=T, direction=direction)) < 1e-6
    assert kl_loss(z_s, z_t, torch.full_like(labels, IGNORE)) == 0
    for half in (torch.float16, torch.bfloat16):  # computed in float32
        found = kl_loss(z_s.to(half), z_t.to(half), labels, temperature=T, direction=direction)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_for_high_temperatures_it_is_half_the_mean_square_of_centred_logits(direction):
    z_s, z_t, labels = normal(3, 5, V, dtype=torch.float64), normal(3, 5, V, seed=1).double(), some_targets()
    gap = (z_s - z_t) - (z_s - z_t).mean(-1, keepdim=True)
    limit = gap.square().sum(-1)[labels != IGNORE].mean() / (2 * V)
    far = kl_loss(z_s, z_t, labels, temperature=1e3, direction=direction)
    torch.testing.assert_close(far, limit, rtol=0.01, atol=0)


def test_the_shares_add_up_and_alpha_0_is_cross_entropy_bit_for_bit():
    z_s, z_t, labels = normal(3, 5, V), normal(3, 5, V, seed=1), some_targets()
    ce = F.cross_entropy(z_s.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert kd_loss(z_s, z_t, labels, alpha=0.0) == ce
    torch.testing.assert_close(kd_loss(z_s, z_t, labels, alpha=1.0), kl_loss(z_s, z_t, labels))
    mixed = 0.3 * kl_loss(z_s, z_t, labels) + 0.7 * ce
    torch.testing.assert_close(kd_loss(z_s, z_t, labels, alpha=0.3), mixed)


def test_what_has_no_target_counts_in_no_loss_whatever_stands_there():
    z_s, z_t, labels = normal(3, 5, V), normal(3, 5, V, seed=1), some_targets()
    other, where = z_t.clone(), labels == IGNORE
    other[where] = torch.nan
    assert torch.equal(kd_loss(z_s, z_t, labels), kd_loss(z_s, other, labels))
    h_s, h_t = normal(3, 5, 4, seed=2).requires_grad_(), normal(3, 5, 4, seed=3)
    loss = feature_loss([h_s], [h_t], labels)
    torch.testing.assert_close(loss, (h_s - h_t)[~where].square().mean())
    loss.backward()
    assert not h_s.grad[where].any() and h_s.grad[~where].all()
    assert feature_loss([h_t, h_t], [h_t, h_t], labels) == 0
    P = nn.Linear(6, 4, bias=False)
    wide = normal(3, 5, 6, seed=4)
    projected = feature_loss([wide], [h_t], labels, [P])
    torch.testing.assert_close(projected, (P(wide) - h_t)[~where].square().mean())


# --- stored teachers --------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_with_all_but_one_token_stored_nothing_but_digits_is_lost(direction):
    z_s, z_t, labels = normal(3, 5, V), normal(3, 5, V, seed=1), some_targets()
    stored = top_k(z_t, V - 1, temperature=2.0)
    exact = kl_loss(z_s, z_t, labels, direction=direction)
    torch.testing.assert_close(kl_loss(z_s, stored, labels, direction=direction), exact, rtol=5e-3, atol=1e-3)
    assert stored.ids.dtype == torch.int32 and stored.log_probs.dtype == torch.float16
    bits = top_k(torch.zeros(4, 1000), k=50)
    assert bits.ids.nbytes + bits.log_probs.nbytes == 4 * 302


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_remainder_is_the_students_own_so_less_is_stored_less_is_asked(direction):
    """A coarser teacher has a smaller KL (log-sum inequality), and 0 to a student with the same numbers."""
    z_s, z_t, labels = normal(3, 5, V), normal(3, 5, V, seed=1), some_targets()
    exact = float(kl_loss(z_s, z_t, labels, direction=direction))
    found = [float(kl_loss(z_s, top_k(z_t, k), labels, direction=direction)) for k in (2, 5, 9, V - 1)]
    assert all(a < b + 1e-3 for a, b in zip(found, [*found[1:], exact], strict=True)) and found[0] < exact
    k, twin = 4, z_t.double().log_softmax(-1)
    stored = top_k(z_t, k, temperature=1.0)
    order = twin.argsort(-1, descending=True)
    rest = order[..., k:]  # spread evenly what the stored teacher says nothing of
    even = twin.gather(-1, rest).logsumexp(-1, keepdim=True) - math.log(V - k)
    twin = twin.scatter(-1, rest, even.expand_as(rest)).requires_grad_()
    loss = kl_loss(twin, stored, labels, temperature=1.0, direction=direction)
    assert abs(float(loss.detach())) < 1e-5
    loss.backward()
    assert twin.grad.abs().max() < 1e-3  # nothing pushes the other tokens down


def test_a_stored_teacher_trains_as_the_teacher_does():
    teacher, ids = tiny("llama"), random_ids(4, 9)
    found = []
    for given, source in ((ids, teacher), (store(teacher, ids, k=47, temperature=2.0), None)):
        student = half_depth(teacher)
        distil(source, student, lambda step, b=given: b, config(micro_batch=2))
        found.append(logits(student, ids))
    start = logits(half_depth(teacher), ids)
    assert (found[0] - found[1]).abs().max() < 0.1 * (found[0] - start).abs().max()
    with pytest.raises(ValueError, match="temperature must be 3.0, the stored one"):
        batch = store(teacher, ids, k=4, temperature=3.0)
        distil(None, half_depth(teacher), lambda step: batch, config())


# --- training ---------------------------------------------------------------------------------------


def closeness(student, teacher, ids):
    labels = targets(ids, None)
    return float(kl_loss(logits(student, ids), logits(teacher, ids), labels, temperature=1.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_comes_nearer_and_the_teacher_stays(family):
    teacher, ids = tiny(family), random_ids(8, 12)
    teacher.train()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    student = half_depth(teacher)
    first = closeness(student, teacher.eval(), ids)
    teacher.train()
    state = torch.random.get_rng_state()
    recipe = Distillation(0.9, features=0.05)
    distil(teacher, student, lambda step: ids, config(16, lr=1e-2, batch=8), recipe)
    assert teacher.training and not student.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert closeness(student, teacher.eval(), ids) < 0.9 * first


def test_alpha_0_is_plain_training_and_a_dict_is_masked_as_in_it():
    ids = random_ids(4, 9)
    labels = ids.clone()
    labels[:, :3] = IGNORE
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    batch = {"input_ids": ids, "labels": labels.masked_fill(mask == 0, IGNORE), "attention_mask": mask}
    teacher = tiny("llama", seed=1)
    for given in (ids, batch):
        plain, student = tiny("llama"), tiny("llama")
        train(plain, lambda step, b=given: b, config(), progress=False)
        distil(teacher, student, lambda step, b=given: b, config(), Distillation(0.0))
        assert torch.equal(logits(plain, ids), logits(student, ids))
    loss = Distillation(1.0, 1.0).loss_fn(teacher)(tiny("llama"), batch)
    rows = targets(batch, 1) != IGNORE
    p, q = (m(ids, attention_mask=mask).logits.log_softmax(-1)[rows] for m in (teacher, tiny("llama")))
    torch.testing.assert_close(loss, (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-4, atol=1e-5)
    assert lm_loss(tiny("llama"), batch) == Distillation(0.0).loss_fn(teacher)(tiny("llama"), batch)


def test_features_alone_are_those_of_the_layer_map_and_zero_for_the_teacher():
    teacher, ids = tiny("llama"), random_ids(4, 9)
    rows = targets(ids, 1) != IGNORE
    recipe = Distillation(0.0, features=2.0)
    twin = copy.deepcopy(teacher)
    ce = Distillation(0.0).loss_fn(teacher)
    assert recipe.loss_fn(teacher)(twin, ids) == ce(twin, ids)
    student = half_depth(teacher)
    states = [m(ids, output_hidden_states=True).hidden_states for m in (student, teacher)]
    expected = sum((states[0][a] - states[1][b])[rows].square().mean() for a, b in ((1, 2), (2, 3)))
    found = recipe.loss_fn(teacher)(student, ids) - ce(student, ids)
    torch.testing.assert_close(found, 2 * expected, rtol=1e-4, atol=1e-5)


def test_a_narrower_student_is_projected_and_the_projection_learns():
    teacher, narrow = tiny("llama"), tiny("llama", hidden_size=16, num_hidden_layers=1)
    names = set(narrow.state_dict())
    batches = lambda step: random_ids(4, 12, seed=step % 4)
    losses = {}
    for lr in (1e-5, 2e-2):
        recipe, generator = Distillation(0.0, features=5.0), torch.Generator().manual_seed(0)
        history = distil(
            teacher, copy.deepcopy(narrow), batches, config(20, lr=lr), recipe, generator=generator
        )
        losses[lr] = history.losses[-1]
    assert losses[2e-2] < 0.9 * losses[1e-5] and set(narrow.state_dict()) == names
    with pytest.raises(ValueError, match="generator is needed to project width 16 to 32"):
        distil(teacher, narrow, batches, config(), Distillation(features=1.0))


# --- students ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_half_the_layers_are_every_second_one_copied(family, n):
    teacher = tiny(family, num_hidden_layers=n)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    student, ids = half_depth(teacher), random_ids(2, 9)
    kept = list(range(0, n, 2))
    assert student.config.num_hidden_layers == len(kept) and teacher.config.num_hidden_layers == n
    layers = (lambda m: m.transformer.h) if family == "gpt2" else (lambda m: m.model.layers)
    cut = copy.deepcopy(teacher)
    for l in reversed(range(n)):
        if l not in kept:
            del layers(cut)[l]
    cut.config.num_hidden_layers = len(kept)
    torch.testing.assert_close(logits(student, ids), cut(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert not shared and not student.training
    generated = student.generate(ids[:1], max_new_tokens=4, do_sample=False)
    again = student.generate(ids[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, again)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())


def test_the_layer_map_is_even_and_ends_at_the_end():
    for n in range(1, 9):
        assert layer_map(n, n) == list(range(1, n + 1))
        assert layer_map((n + 1) // 2, n) == [min(2 * (l + 1), n) for l in range((n + 1) // 2)]


# --- bad input --------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_changes():
    z, labels, teacher, ids = normal(3, 5, V), some_targets(), tiny("llama"), random_ids(4, 8)
    student, batches = half_depth(teacher), lambda step: ids
    before = logits(student, ids)
    nan = z.clone()
    nan[0, 4] = torch.nan
    compressed, sliced, adapted = tiny("llama"), tiny("llama"), tiny("llama")
    compress_model(compressed, RTN(4, group=8), ids)
    slice_model(sliced, torch.ones(3, 4).bool(), torch.arange(40).lt(20).expand(3, 40))
    add_lora(adapted, ["q_proj"], 2, 2, torch.Generator())
    for call, error, message in [
        (lambda: kd_loss(z, z, labels, alpha=1.5), ValueError, "alpha must be a number from 0 to 1"),
        (lambda: kd_loss(z, z, labels, alpha=math.nan), ValueError, "alpha"),
        (lambda: kl_loss(z, z, labels, temperature=0.0), ValueError, "temperature must be a finite"),
        (lambda: kl_loss(z, z, labels, direction="both"), ValueError, "one of forward, reverse, got 'both'"),
        (lambda: kl_loss(z, z[:, :, :-1], labels), ValueError, "teacher must be .3, 5, 13."),
        (lambda: kl_loss(z[:, 1:], z, labels), ValueError, "student must be .3, 5"),
        (lambda: kl_loss(z, z, labels.float()), ValueError, "targets must be a LongTensor"),
        (lambda: kl_loss(z[:0], z[:0], labels[:0]), ValueError, "not empty"),
        (lambda: kl_loss(z, nan, labels), ValueError, "teacher must be finite where there is a target"),
        (lambda: kl_loss(z, top_k(z[:2]), labels), ValueError, "k must be an integer from 1 to V - 1 = 12"),
        (lambda: kl_loss(z, top_k(z[:2], 3), labels), ValueError, "teacher must be of .3, 5., got .2, 5."),
        (lambda: top_k(nan, 3), ValueError, "logits must be finite"),
        (lambda: top_k(z, 0), ValueError, "k must be"),
        (lambda: top_k(z, 3, 0), ValueError, "temperature"),
        (lambda: feature_loss([z], [], labels), ValueError, "equally many, at least one, got 1, 0, 1"),
        (lambda: feature_loss([z], [z], labels, [nn.Identity()] * 2), ValueError, "got 1, 1, 2"),
        (lambda: feature_loss([z], [z[..., :4]], labels), ValueError, "13 wide, its teacher 4: project it"),
        (lambda: Distillation(2.0), ValueError, "alpha"),
        (lambda: Distillation(features=-1.0), ValueError, "features must be a finite number >= 0"),
        (lambda: distil(student, student, batches, config()), ValueError, "share parameters"),
        (
            lambda: distil(tiny("llama", vocab_size=50), student, batches, config()),
            ValueError,
            "student must have the teacher's vocabulary 50, got 48",
        ),
        (
            lambda: distil(None, student, batches, config(), Distillation(features=1.0)),
            ValueError,
            "features need a teacher",
        ),
        (
            lambda: distil(student, tiny("llama"), batches, config(), Distillation(features=1.0)),
            ValueError,
            "student must have 1 to 2 layers",
        ),
        (lambda: half_depth(nn.Linear(2, 2)), TypeError, "Linear is not"),
        (lambda: half_depth(tiny("llama", num_hidden_layers=1)), ValueError, "two layers or more, got 1"),
        (lambda: half_depth(compressed), TypeError, "GridLinear"),
        (lambda: half_depth(sliced), ValueError, "sliced or has LoRA"),
        (lambda: half_depth(adapted), ValueError, "sliced or has LoRA"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(logits(student, ids), before)
    assert isinstance(top_k(z, 3), TopK)
