"""MixLLM: its salience against finite differences, the global choice, its limits, bytes, both families."""

import copy

import pytest
import torch
import torch.nn.functional as F
from quantization_runs import through_a_file

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.quantization import (
    GPTQ,
    RTN,
    compress_model,
    compressed_names,
    dequantize,
    stats_of,
)
from refimpl.quantization.feedback import damped
from refimpl.quantization.grids import Grid, Quantized
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.mixllm import MixedRows, MixLLM, grouped_gptq, mixllm
from refimpl.quantization.mixllm_rows import row_salience, rows_within, top_rows
from refimpl.quantization.packing import packed_bytes

IDS = random_ids(5, 20)


def layer(d_out=24, d_in=48):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(d_out, d_in, generator=generator) * 0.1
    X = torch.randn(300, 12, generator=generator) @ torch.randn(12, d_in, generator=generator)
    X = X + 0.3 * torch.randn(300, d_in, generator=generator)
    return W, X * torch.rand(d_in, generator=generator), generator


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# --- salience ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_order_term_is_the_slope_of_the_loss_along_the_rows_error(family):
    model, grid = tiny(family, num_hidden_layers=1).double(), Grid(2, group=8)
    name = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.attn.c_attn"}[family]
    W, sequence = dense_weight(model.get_submodule(name)), IDS[:1]
    score = row_salience(model, sequence, grid)[name]
    delta = dequantize(grid.quantize(W)).double() - W
    for row in (0, 7, 20):
        kept, losses = W[row].clone(), []
        for step in (3e-3, -3e-3):
            W[row] = kept + step * delta[row]
            with torch.no_grad():
                logits = model(sequence).logits[0, :-1]
            losses.append(float(F.cross_entropy(logits, sequence[0, 1:])))
        W[row] = kept
        a = (losses[0] - losses[1]) / 6e-3
        assert float(score[row]) == pytest.approx(abs(a + a**2 / 2), rel=0.01)


def test_every_sequence_counts_by_its_absolute_value():
    model, grid = tiny("llama"), Grid(2, group=8)
    whole = row_salience(model, IDS, grid)
    alone = [row_salience(model, sequence, grid) for sequence in IDS.split(1)]
    for name, scores in whole.items():
        assert torch.allclose(scores, sum(one[name] for one in alone)) and bool((scores >= 0).all())
    assert all(not scores.requires_grad for scores in whole.values())


def test_salience_leaves_the_model_as_it_was():
    model = tiny("gpt2")
    before = copy.deepcopy(model)
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    row_salience(model, IDS, Grid(2, group=8))
    assert same_weights(model, before) and all(p.grad is None for p in model.parameters())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["transformer.h.0.mlp.c_fc.weight"]


# --- the choice ----------------------------------------------------------------------------------------


def test_rows_are_chosen_among_all_layers_and_not_by_their_norm():
    model = tiny("llama")
    salience = row_salience(model, IDS, Grid(2, group=8))
    rows = top_rows(salience, 0.1)
    shares = [float(r.float().mean()) for r in rows.values()]
    assert max(shares) - min(shares) > 0.2
    n = sum(len(r) for r in rows.values())
    assert sum(int(r.sum()) for r in rows.values()) == n // 10
    kept = torch.cat([salience[name][r] for name, r in rows.items()])
    left = torch.cat([salience[name][~r] for name, r in rows.items()])
    assert kept.min() >= left.max()
    norms = {name: dense_weight(model.get_submodule(name)).norm(dim=1) for name in rows}
    by_norm = top_rows(norms, 0.1)
    assert sum(int((rows[name] & by_norm[name]).sum()) for name in rows) < 0.7 * (n // 10)


def test_equal_weights_are_equal_bytes_and_equal_rows_are_not():
    model, ids = tiny("llama", intermediate_size=64, num_hidden_layers=2), IDS
    salience = row_salience(model, ids, Grid(2, group=8))
    d_in = {name: dense_weight(model.get_submodule(name)).shape[1] for name in salience}
    rows = top_rows(salience, 0.1)
    weights = sum(int(r.sum()) * d_in[name] for name, r in rows.items())
    generator = torch.Generator().manual_seed(0)
    other = rows_within(
        {k: torch.rand(len(s), generator=generator) for k, s in salience.items()}, d_in, weights
    )
    total = [sum(int(r.sum()) * d_in[name] for name, r in chosen.items()) for chosen in (rows, other)]
    assert total == [weights, weights]
    counts = [sum(int(r.sum()) for r in chosen.values()) for chosen in (rows, other)]
    assert counts[0] != counts[1]
    sizes = [
        compress_model(copy.deepcopy(model), MixLLM(chosen, 2, 8, 8), ids).bytes_after
        for chosen in (rows, other)
    ]
    assert abs(sizes[0] - sizes[1]) <= 14 * 3  # codes, zero points end on whole bytes in each layer


def test_ranking_errors_are_refused():
    scores = {"a": torch.tensor([1.0, 2.0])}
    for share in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match="share"):
            top_rows(scores, share)
    with pytest.raises(ValueError, match="scores"):
        top_rows({"a": torch.tensor([float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="scores"):
        top_rows({}, 0.5)
    with pytest.raises(ValueError, match="weights"):
        rows_within(scores, {"a": 4}, -1)
    with pytest.raises(ValueError, match="d_in"):
        rows_within(scores, {}, 4)


# --- the solver ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_clipping_and_with_groups_in_order_it_is_gptq(symmetric):
    W, X, _ = layer()
    X[:, :16], X[:, 16:32] = X[:, :16] * 9, X[:, 16:32] * 3  # groups fall by themselves
    H, scheme = stats_of(X).H, "restricted" if symmetric else "asymmetric"
    ours = grouped_gptq(W, H, Grid(3, scheme, 16), clip=False)
    theirs = GPTQ(3, scheme, 16).solve(W, H)
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("bits", [2, 4])
def test_error_feedback_helps_the_outputs(bits):
    W, X, _ = layer()
    H, grid = stats_of(X).H, Grid(bits, "asymmetric", 16)
    D = damped(H, 0.01)
    error = lambda q: float((((dequantize(q) - W).double() @ D) * (dequantize(q) - W)).sum())
    for clip in (False, True):
        assert error(grouped_gptq(W, H, grid, clip)) < 0.8 * error(grid.quantize(W))


def test_the_clipped_range_is_the_best_that_is_tried_for_the_groups_own_outputs():
    W, X, _ = layer(24, 16)
    H, grid = stats_of(X).H, Grid(2, "asymmetric", 16)
    found = grouped_gptq(W, H, grid).scale  # one group: its scale comes before any feedback

    def error(scale, zero):
        d = (dequantize(Quantized(grid.encode(W, scale, zero), scale, zero)) - W).double()
        return ((d @ H) * d).sum(1)

    tried = [grid.fit(W * percent / 100) for percent in range(80, 101, 2)]
    errors = torch.stack([error(*t) for t in tried])
    best = errors.argmin(0).tolist()
    assert torch.equal(found, torch.stack([tried[b][0][row] for row, b in enumerate(best)]))
    assert len(set(best)) > 3 and float(errors.min(0).values.sum()) < 0.95 * float(errors[-1].sum())


# --- layers --------------------------------------------------------------------------------------------


def test_no_rows_and_all_rows_are_the_uniform_layers():
    W, X, _ = layer()
    stats = stats_of(X)
    for share, grid in ((False, Grid(2, "asymmetric", 16)), (True, Grid(8, "restricted", 16))):
        made = MixLLM({"fc": torch.full((24,), share)}, 2, 8, 16)("fc", W, stats)
        assert torch.equal(made.weight, dequantize(grouped_gptq(W, stats.H, grid)))
        assert set(dict(made.named_buffers())) == ({"rows", "high", "high_scale"} if share else
                                                   {"rows", "low", "low_scale", "low_zero"})  # fmt: skip


def test_bytes_are_those_of_two_packed_row_sets():
    W, X, generator = layer()
    rows = torch.rand(24, generator=generator) < 0.3
    made, n = MixLLM({"fc": rows}, 2, 8, 16)("fc", W, stats_of(X)), int(rows.sum())
    low = packed_bytes((24 - n) * 48, 2) + 2 * (24 - n) * 3 + packed_bytes((24 - n) * 3, 2)
    assert made.nbytes() == 3 + low + n * 48 + 2 * n * 3
    error = (made.weight - W).norm(dim=1)
    assert error[rows].max() < 0.2 * error[~rows].min()


def test_inputs_are_rounded_per_token_and_group_and_gradients_pass_through():
    W, X, _ = layer()
    rows, x = torch.arange(24) < 3, X[:4].clone().requires_grad_()
    quiet = MixLLM({"fc": rows}, 2, 8, 16, a8=False)("fc", W, stats_of(X))
    loud = MixLLM({"fc": rows}, 2, 8, 16)("fc", W, stats_of(X))
    groups = x.detach().view(4, 3, 16)
    step = groups.abs().amax(-1, keepdim=True) / 127
    expected = ((groups / step).round() * step).view(4, 48) @ loud.weight.T
    assert torch.allclose(loud(x), expected, atol=1e-5) and not torch.equal(loud(x), quiet(x))
    loud(x).sum().backward()
    assert torch.allclose(x.grad, loud.weight.sum(0).expand(4, -1), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_compressed_saved_and_loaded(family, tmp_path):
    model = tiny(family, num_hidden_layers=1)
    done = mixllm(model, IDS, 0.2, low=2, group=8)
    assert set(compressed_names(model)) == set(done.rows)
    assert all(isinstance(model.get_submodule(name), MixedRows) for name in done.rows)
    through_a_file(model, tiny(family, seed=1, num_hidden_layers=1), tmp_path, IDS)


def test_all_rows_at_eight_bits_is_nearly_the_model_and_more_rows_are_better():
    plain = tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        logits = plain(IDS).logits
    errors = []
    for share in (0.0, 0.3, 1.0):
        model = copy.deepcopy(plain)
        mixllm(model, IDS, share, low=2, group=8)
        with torch.no_grad():
            errors.append(float((model(IDS).logits - logits).square().mean()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3 * float(logits.square().mean())


@pytest.mark.parametrize(
    ("change", "word"),
    [({"low": 8}, "low"), ({"low": 1}, "bits"), ({"high": 9}, "bits"), ({"group": 0}, "group"),
     ({"group": 7}, "group"), ({"group": "row"}, "group"), ({"share": 2.0}, "share")],
)  # fmt: skip
def test_bad_values_are_named_and_change_nothing(change, word):
    model = tiny("llama")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=word):
        mixllm(model, IDS, **({"share": 0.1, "low": 2, "group": 8} | change))
    assert same_weights(model, before)


def test_bad_inputs_are_named():
    W, X, _ = layer()
    stats = stats_of(X)
    with pytest.raises(ValueError, match="rows of fc"):
        MixLLM({}, 2, 8, 16)("fc", W, stats)
    with pytest.raises(ValueError, match="rows of fc"):
        MixLLM({"fc": torch.ones(5, dtype=torch.bool)}, 2, 8, 16)("fc", W, stats)
    with pytest.raises(ValueError, match="bool"):
        MixLLM({"fc": torch.ones(24)})
    with pytest.raises(ValueError, match="damp"):
        MixLLM({}, damp=-1.0)
    with pytest.raises(ValueError, match="H must"):
        grouped_gptq(W, torch.eye(3).double(), Grid(2, group=16))
    with pytest.raises(ValueError, match="finite"):
        grouped_gptq(W / 0, stats.H, Grid(2, group=16))
    for ids in (IDS[:, :1], IDS[:0], IDS.float()):
        with pytest.raises((ValueError, TypeError), match="ids"):
            row_salience(tiny("llama"), ids, Grid(2, group=8))
    compressed = tiny("llama", num_hidden_layers=1)
    compress_model(compressed, RTN(4, group=8), IDS)
    with pytest.raises(TypeError, match="nn.Linear"):
        row_salience(compressed, IDS, Grid(2, group=8))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("a8", [False, True])
def test_with_all_rows_at_eight_bits_every_family_is_nearly_the_plain_model(family, a8):
    """Within 3 % of the spread of the logits, the rounding of the inputs included; 2 bits are far off."""
    plain, errors = tiny(family, num_hidden_layers=1), []
    with torch.no_grad():
        before = plain(IDS).logits
        for share in (0.0, 1.0):
            model = copy.deepcopy(plain)
            mixllm(model, IDS, share, low=2, group=8, a8=a8)
            errors.append(float((model(IDS).logits - before).std() / before.std()))
    assert errors[1] < (0.03 if a8 else 0.02) and errors[0] > 10 * errors[1] > 0
