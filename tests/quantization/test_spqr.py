"""SpQR: its authors' arrays, what its outliers and small scales do, bytes, both families."""

from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from quantization_runs import IDS, through_a_file

from refimpl.checks.tiny import tiny
from refimpl.quantization import GPTQ, RTN, compress_model, stats_of
from refimpl.quantization.feedback import damped, feedback_quantize
from refimpl.quantization.spqr import SpQR, SpQRLinear, leave_one_out

GOLDEN = Path(__file__).parent / "golden" / "spqr.npz"
CASES = {
    "3": (3, inf, 3, False),
    "3_outliers": (3, 0.5, 3, False),
    "2_outliers": (2, 1.0, 4, False),
    "3_outliers_actorder": (3, 0.2, 3, True),
}


def layer(d_out=32, d_in=64):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(d_out, d_in, generator=generator) * 0.1
    W[torch.arange(8), torch.arange(8) * 7] *= 8
    X = torch.randn(400, 16, generator=generator) @ torch.randn(16, d_in, generator=generator)
    X = X + 0.3 * torch.randn(400, d_in, generator=generator)
    return W, stats_of(X * torch.rand(d_in, generator=generator))


def output_error(W, Q, H):
    d = (Q - W).double()
    return float(((d @ damped(H, 0.01)) * d).sum())


@pytest.mark.parametrize("case", CASES)
def test_the_matrix_and_its_outliers_are_those_of_the_authors_code(case):
    golden = np.load(GOLDEN)
    W, H = torch.from_numpy(golden["W"]), torch.from_numpy(golden["H"])
    bits, threshold, meta_bits, act_order = CASES[case]
    solved = SpQR(bits, 8, threshold, meta_bits, 8, act_order, dtype=torch.float32).solve(W, H)
    assert np.array_equal(solved.outliers.numpy(), golden[f"{case}_outliers"])
    assert case == "3" or 4 <= int(solved.outliers.sum()) < 20
    np.testing.assert_allclose(solved.Q.numpy(), golden[f"{case}_Q"], atol=1e-5)


def test_the_layer_is_what_was_solved():
    W, stats = layer()
    for act_order in (False, True):
        recipe = SpQR(3, 8, 0.3, act_order=act_order)
        made, solved = recipe("fc", W, stats), recipe.solve(W, stats.H)
        assert isinstance(made, SpQRLinear)
        assert torch.allclose(made.weight.double(), solved.Q, atol=1e-6)
        kept = solved.Q[solved.outliers]
        assert len(kept) and torch.equal(made.weight[solved.outliers], kept.half().float())
        assert solved.loss == pytest.approx(output_error(W, solved.Q, stats.H), rel=1e-6)


def test_without_outliers_it_is_gptq_on_its_own_grids():
    W, stats = layer()
    solved = SpQR(3, 8, inf).solve(W, stats.H)
    scale, zero = (
        (m.float().repeat_interleave(16, 0) + s.float().repeat_interleave(16, 0) * c).double()
        for c, s, m in (solved.levels["scale"], solved.levels["zero"])
    )

    def encode(step):
        s, z = (t[:, [step.start // 8]] for t in (scale, zero))
        codes = (step.w / s + z).round().clamp(0, 7)
        return s * (codes - z), codes

    expected = feedback_quantize(W, stats.H, encode)
    assert not bool(solved.outliers.any())
    assert torch.equal(solved.codes, expected.codes.to(torch.uint8)) and torch.allclose(solved.Q, expected.Q)
    # 16 levels of scale in a group of rows cost little: the error is that of GPTQ with 16-bit scales.
    exact = GPTQ(3, group=8).solve(W, stats.H)
    theirs = output_error(W, exact.scale.repeat_interleave(8, 1) * (exact.codes.float()
                          - exact.zero.repeat_interleave(8, 1)), stats.H)  # fmt: skip
    assert solved.loss < 1.5 * theirs


def test_threshold_zero_keeps_everything():
    W, stats = layer()
    made = SpQR(2, 8, 0.0)("fc", W, stats)
    assert float((made.weight - W).abs().max()) < 1e-3
    assert made.bits_per_weight > 32


def test_more_outliers_are_more_bytes_and_less_error():
    W, stats = layer()
    solved = [SpQR(2, 8, threshold).solve(W, stats.H) for threshold in (inf, 2.0, 0.5, 0.1, 0.0)]
    counts, losses = [int(s.outliers.sum()) for s in solved], [s.loss for s in solved]
    assert counts == sorted(counts) and losses == sorted(losses, reverse=True)
    assert counts[0] == 0 and 0 < counts[1] < 0.1 * W.numel()


def test_outliers_are_weights_whose_error_costs_and_not_the_largest():
    W, stats = layer()
    solved = SpQR(3, 8, 0.1).solve(W, stats.H)
    count = int(solved.outliers.sum())
    largest = W.abs() >= W.abs().flatten().sort().values[-count]
    assert 0 < int((largest & solved.outliers).sum()) < count


def test_scales_are_fitted_without_outliers():
    W, stats = layer()
    W[20, 33] = 5.0
    others = torch.arange(32, 40) != 33
    with_them, without = (SpQR(3, 8, t).solve(W, stats.H).Q[20, 32:40][others] for t in (inf, 1.0))
    assert SpQR(3, 8, 1.0).solve(W, stats.H).outliers[20, 33]
    assert len(without.unique()) > len(with_them.unique())


def test_leaving_one_out_is_what_it_says():
    w, diagonal = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 2, 6)
    found = leave_one_out(w, diagonal, 3)

    def error(x, d):
        lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        scale = (hi - lo) / 7
        q = ((x - lo) / scale).round() * scale + lo
        return ((x - q) / d).square().sum(1)

    for j in range(6):
        left = [k for k in range(6) if k != j]
        expected = error(w, diagonal) - error(w[:, left], diagonal[left])
        assert torch.allclose(found[:, j], expected, atol=1e-4)


def test_bytes_are_true():
    W, stats = layer()
    made = SpQR(3, 16, inf)("fc", W, stats)
    assert made.bits_per_weight == 3 + 2 * 3 / 16 + 64 / 256  # the paper's 3.63
    ordered = SpQR(3, 16, inf, act_order=True)("fc", W, stats)
    assert ordered.bits_per_weight == made.bits_per_weight + 16 / 32
    sparse = SpQR(3, 16, 0.5)("fc", W, stats)
    n = sparse.values.numel()
    assert sparse.nbytes() == made.nbytes() + 4 * n + 4 * 33 and n > 0


def test_degenerate_groups():
    W, stats = layer()
    W[:, :16] = 0.0  # a constant group, and zero points and scales of all rows alike
    W[0, 16:32] = 0.25
    made = SpQR(3, 8, 0.5)("fc", W, stats)
    assert bool(made.weight.isfinite().all())
    assert float((made.weight[:, :16]).abs().max()) < 0.2
    H = stats.H.clone()
    H[40], H[:, 40] = 0, 0
    assert float(SpQR(3, 8, inf).solve(W, H).Q[:, 40].abs().max()) < 0.3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", [SpQR(3, 8, 0.5, meta_group=8), SpQR(2, 8, inf, 4, 8, True)], ids=str)
def test_models_are_compressed_saved_and_loaded(family, recipe, tmp_path):
    model = tiny(family, num_hidden_layers=1)
    report = compress_model(model, recipe, IDS)
    assert report.bits < 9
    through_a_file(model, tiny(family, seed=1, num_hidden_layers=1), tmp_path)


def test_outliers_bring_the_outputs_closer_to_the_models():
    plain, errors = tiny("llama", num_hidden_layers=1), []
    with torch.no_grad():
        logits = plain(IDS).logits
    for recipe in (RTN(2, group=8), SpQR(2, 8, inf, meta_group=8), SpQR(2, 8, 0.2, meta_group=8)):
        model = tiny("llama", num_hidden_layers=1)
        compress_model(model, recipe, IDS)
        with torch.no_grad():
            errors.append(float((model(IDS).logits - logits).square().mean()))
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"group": 1}, "group"), ({"group": "row"}, "group"),
     ({"meta_group": 0}, "meta_group"), ({"meta_bits": 1}, "meta_bits"), ({"threshold": -1.0}, "threshold"),
     ({"threshold": float("nan")}, "threshold"), ({"damp": -0.1}, "damp"), ({"dtype": torch.int8}, "dtype")],
)  # fmt: skip
def test_bad_values_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        SpQR(**change)


def test_bad_inputs_are_named_and_change_nothing():
    W, stats = layer()
    with pytest.raises(ValueError, match="meta_group"):
        SpQR(3, 16, meta_group=24)("fc", W, stats)
    with pytest.raises(ValueError, match="group"):
        SpQR(3, 24)("fc", W, stats)
    with pytest.raises(ValueError, match="H must"):
        SpQR(3, 16).solve(W, stats.H[:5, :5])
    with pytest.raises(ValueError, match="finite"):
        SpQR(3, 16).solve(W / 0, stats.H)
    with pytest.raises(ValueError, match="cannot hold"):
        SpQR(3, 16, 0.1).solve(W * 1e7, stats.H)
    with pytest.raises(TypeError, match="floating"):
        SpQR(3, 16).solve(W.int(), stats.H)
    model = tiny("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="meta_group"):
        compress_model(model, SpQR(3, 8), IDS)  # gate_proj has 40 rows
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
