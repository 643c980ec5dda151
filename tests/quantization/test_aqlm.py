"""AQLM: no phase raises the error, beams, k-means, true bits, both families, and what is refused."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from quantization_runs import IDS, logits, shallow, through_a_file

from refimpl.checks.tiny import tiny
from refimpl.quantization import GPTQ, compress_model
from refimpl.quantization.aqlm import AQLM, Additive, beam_search, residual_kmeans
from refimpl.quantization.codebooks import CodebookLinear
from refimpl.quantization.gptvq import GPTVQ


def problem(d_out=64, d_in=32, seed=0):
    """W, and H of correlated inputs of different size, in float32."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(500, 8)) @ rng.normal(size=(8, d_in)) + 0.4 * rng.normal(size=(500, d_in))
    X *= rng.uniform(0.3, 2, d_in)
    return torch.from_numpy(rng.normal(size=(d_out, d_in))).float(), torch.from_numpy(
        2 / 500 * X.T @ X
    ).float()


def random_start(d_out, groups, M, K, g, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, K, (d_out, groups, M), generator=generator).to(torch.uint8)
    return Additive(
        codes, torch.randn(M, K, g, generator=generator), 0.5 + torch.rand(d_out, generator=generator)
    )


def error(W, H, found):
    difference = (W - found.restore()).double()
    return ((difference @ H.double()) * difference).sum(1)


# --- the search -----------------------------------------------------------------------------------


def test_a_full_beam_is_brute_force_over_all_codes():
    """M = 2 in one group: K hypotheses; two groups as well: K^3 keep everything until the last step."""
    K = 3
    for groups, M, beam in ((1, 2, K), (2, 1, K), (2, 2, K**3)):
        W, H = problem(20, 2 * groups)
        start = random_start(20, groups, M, K, 2)
        found = start._replace(codes=beam_search(W, H, start, beam))
        everything = [
            error(W, H, start._replace(codes=torch.tensor(code).view(1, groups, M).expand(20, -1, -1)))
            for code in product(range(K), repeat=groups * M)
        ]
        torch.testing.assert_close(error(W, H, found), torch.stack(everything).amin(0), rtol=1e-4, atol=1e-5)


def test_greedy_search_never_raises_the_error_and_ends_where_no_code_helps():
    W, H = problem(16, 16)
    now = random_start(16, 4, 2, 4, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        after = now._replace(codes=beam_search(W, H, now, 1, generator))
        assert bool((error(W, H, after) <= error(W, H, now) * (1 + 1e-5)).all())
        now = after
    best = error(W, H, now)
    for j, m, k in product(range(4), range(2), range(4)):
        codes = now.codes.clone()
        codes[:, j, m] = k
        assert bool((error(W, H, now._replace(codes=codes)) >= best * (1 - 1e-4)).all())


def test_a_wider_beam_finds_less_error():
    totals = []
    for beam in (1, 4, 16):
        found = []
        for seed in range(3):
            W, H = problem(64, 32, seed)
            start = random_start(64, 8, 2, 8, 4, seed)
            found.append(float(error(W, H, start._replace(codes=beam_search(W, H, start, beam))).sum()))
        totals.append(sum(found))
    assert totals[0] > totals[1] > totals[2]


# --- phases ---------------------------------------------------------------------------------------


def test_no_phase_raises_the_error_and_the_last_one_reported_is_true():
    W, H = problem()
    found, losses = AQLM(2, 4, 4, epochs=4, steps=20, tolerance=0.0).solve(W, H)
    assert len(losses) == 9 and all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    assert losses[1] < losses[0] and losses[2] < 0.9 * losses[1]  # Adam; the search
    assert losses[-1] == pytest.approx(float(error(W, H, found).mean()), rel=1e-6)
    _, wild = AQLM(2, 4, 4, epochs=1, steps=5, lr=50.0).solve(W, H)
    assert wild[1] == wild[0]  # an epoch of Adam that makes it worse is undone
    _, short = AQLM(2, 4, 4, epochs=50, steps=2, tolerance=0.5).solve(W, H)
    assert len(short) < 9


def test_without_epochs_it_is_kmeans_of_what_is_left():
    W, H = problem()
    found, losses = AQLM(2, 3, 4, epochs=0).solve(W, H)
    assert len(losses) == 1
    torch.testing.assert_close(found.scale, W.norm(dim=1))
    left = (W / found.scale[:, None]).view(-1, 4)
    for m in range(2):
        distance = torch.cdist(left, found.codebooks[m])
        codes = found.codes[..., m].flatten().long()
        torch.testing.assert_close(distance.gather(1, codes[:, None])[:, 0], distance.amin(1))
        left = left - found.codebooks[m, codes]


def test_the_seed_decides_and_the_global_generator_does_not():
    W, H = problem(32, 16)
    codes = lambda seed: AQLM(2, 3, 4, epochs=1, steps=2, seed=seed).solve(W, H)[0].codes
    torch.manual_seed(0)
    first = codes(0)
    assert torch.equal(first, codes(0)) and not torch.equal(first, codes(1))
    state = torch.get_rng_state()
    codes(0)
    assert torch.equal(state, torch.get_rng_state())


def test_at_no_more_bits_it_leaves_less_of_the_outputs_than_gptq():
    """2 x 4 bits for four weights, in a matrix large enough for the codebooks not to matter."""
    W, H = problem(512, 64)
    loss = lambda layer: float((((W - layer.weight) @ H) * (W - layer.weight)).sum())
    aqlm = AQLM(2, 4, 4, beam=4, epochs=3, steps=30).layer(W, H)
    gptq = GPTQ(2, group=32)("", W, type("Stats", (), {"H": H}))
    assert aqlm.bits_per_weight < gptq.bits_per_weight
    assert loss(aqlm) < loss(GPTVQ(2, 2).layer(W, H)) < loss(gptq)


# --- layers and models ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_of_codes_codebooks_and_scales(family, tmp_path):
    fast = {"epochs": 1, "steps": 2, "iterations": 5}
    model, plain = shallow(family), shallow(family)
    report = compress_model(model, AQLM(2, 8, 2, **fast), IDS)
    before = logits(plain)
    near = (logits(model) - before).std()
    assert near < 0.1 * before.std()
    for row in report.rows:
        layer, (d_out, d_in) = model.get_submodule(row.name), row.shape
        assert isinstance(layer, CodebookLinear)
        stored = layer.nbytes() - (0 if layer.bias is None else layer.bias.nbytes)
        assert stored == d_out * d_in // 2 * 2 + 2 * 256 * 2 * 2 + d_out * 2  # codes, codebooks, scales
        with torch.no_grad():
            old = plain.get_submodule(row.name).weight
            (old if family == "llama" else old.T).copy_(layer.weight)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    coarse = shallow(family)
    compress_model(coarse, AQLM(2, 4, 4, **fast), IDS)
    assert (logits(coarse) - before).std() > 4 * near
    through_a_file(coarse, shallow(family, seed=1), tmp_path)


def test_dead_inputs_and_rows_of_zeros_do_no_harm():
    W, H = problem(32, 16)
    H[3], H[:, 3], W[5] = 0, 0, 0
    layer = AQLM(2, 3, 4, epochs=2, steps=5).layer(W, H)
    assert bool(layer.weight.isfinite().all()) and layer.weight[5].abs().max() < 1e-3


def test_bad_input_is_refused_before_anything_changes():
    W, H = problem(16, 16)
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    for call, message in [
        (lambda: AQLM(0), "codebooks must be"),
        (lambda: AQLM(bits=9), "bits must be at most 8"),
        (lambda: AQLM(bits=2.5), "bits must be an integer"),
        (lambda: AQLM(group=0), "group must be"),
        (lambda: AQLM(beam=0), "beam must be"),
        (lambda: AQLM(epochs=-1), "epochs must be"),
        (lambda: AQLM(lr=0), "lr must be"),
        (lambda: AQLM(tolerance=1), "tolerance must be"),
        (lambda: AQLM(seed=None), "seed must be"),
        (lambda: AQLM(group=5).solve(W, H), "group must be a divisor of d_in = 16"),
        (lambda: AQLM(bits=7).solve(W, H), "k must be 1 to 64"),
        (lambda: AQLM().solve(W[:0], H), "W must be a finite"),
        (lambda: AQLM().solve(W[0], H), "W must be a finite"),
        (lambda: AQLM().solve(W.long(), H), "W must be a finite floating-point"),
        (lambda: AQLM().solve(W / 0, H), "W must be a finite"),
        (lambda: AQLM().solve(W, H[:4]), "H must be finite"),
        (lambda: AQLM().solve(W, H * torch.nan), "H must be finite"),
        (lambda: residual_kmeans(W, 1, 17, 1, torch.Generator()), "k must be 1 to 16"),
        (lambda: compress_model(model, AQLM(group=16, epochs=0, iterations=1), IDS), "divisor of d_in = 40"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
