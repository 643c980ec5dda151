"""The solver's exact invariant, and what it must equal where the answer is known."""

import itertools

import pytest
import torch

from refimpl.quantization.feedback import by_diagonal, damped, feedback_quantize, inverse_factor
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.grids import Grid, dequantize
from refimpl.quantization.symmetric import distortion, output_distortion


def problem(d_out=32, d_in=96, tokens=400, seed=0):
    """A weight and the H of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    X = draw(tokens, d_in // 4) @ draw(d_in // 4, d_in) + 0.5 * draw(tokens, d_in)
    X = X * torch.linspace(0.5, 2, d_in)[torch.randperm(d_in, generator=generator)]
    return draw(d_out, d_in), 2 / tokens * X.T @ X


def rounding(step=0.7):
    return lambda s: ((s.w / step).round() * step, (s.w / step).round())


def identity(step):
    return step.w.clone(), step.w.clone()


@pytest.mark.parametrize("vdim", [1, 2, 8])
@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("sorted_", [False, True])
def test_the_loss_is_the_damped_output_error(vdim, damp, sorted_):
    W, H = problem()
    order = by_diagonal(H, vdim) if sorted_ else None
    result = feedback_quantize(W, H, rounding(), vdim=vdim, order=order, damp=damp, lazy=32)
    assert result.loss == pytest.approx(output_distortion(W, result.Q, damped(H, damp)), rel=1e-10)
    assert torch.equal(result.codes * 0.7, result.Q)  # codes in the order of W


@pytest.mark.parametrize("vdim", [1, 4])
def test_how_many_columns_wait_changes_nothing(vdim):
    W, H = problem()
    results = [feedback_quantize(W, H, rounding(), vdim=vdim, lazy=lazy).Q for lazy in (4, 16, 96, 128)]
    assert all(torch.equal(results[0], Q) for Q in results)


def test_a_diagonal_h_leaves_rounding_to_nearest():
    W, H = problem()
    H = torch.diag(H.diagonal())
    assert torch.equal(feedback_quantize(W, H, rounding()).Q, (W / 0.7).round() * 0.7)
    for group in ("tensor", "row", 16):
        grid, solver = Grid(3, group=group), GPTQ(3, group=group)
        assert torch.equal(solver.solve(W, H).codes, grid.quantize(W).codes)


def test_without_rounding_nothing_changes():
    W, H = problem()
    result = feedback_quantize(W, H, identity, vdim=3, lazy=12)
    assert torch.equal(result.Q, W) and result.loss == 0


def test_it_is_ldlq_from_the_last_column_to_the_first_on_the_reversed_problem():
    """Theorem of QuIP (2307.13304): with H = M D M', M unit lower, LDLQ rounds w_k + (w - q)_>k M_>k,k."""
    W, H = problem(d_in=24)
    Hd = damped(H, 0.01)
    order = torch.arange(23, -1, -1)
    ours = feedback_quantize(W, H, rounding()).Q[:, order]
    R = Hd[order][:, order]
    C = torch.linalg.cholesky(R)
    M = C / C.diagonal()
    w, Q = W[:, order], torch.zeros_like(W)
    for k in range(23, -1, -1):
        t = w[:, k] + (w[:, k + 1 :] - Q[:, k + 1 :]) @ M[k + 1 :, k]
        Q[:, k] = (t / 0.7).round() * 0.7
    assert torch.equal(ours, Q)


def test_no_matrix_of_the_grid_beats_the_optimum_and_feedback_mostly_beats_rounding():
    better = 0
    points = 0.7 * torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float64)
    nearest_point = lambda w: (w / 0.7).round().clamp(-3, 3) * 0.7
    for seed in range(100):
        W, H = problem(1, 4, 60, seed)
        error = lambda Q, W=W, H=H: (((W - Q) @ H) * (W - Q)).sum(1).min().item()
        ours = error(feedback_quantize(W, H, lambda s: (nearest_point(s.w), s.w), damp=0).Q)
        assert ours >= error(points) * (1 - 1e-9)
        better += ours <= error(nearest_point(W)) * (1 + 1e-9)
    assert better >= 75


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_gain_what_weights_lose(bits):
    """Survey, Eq. 7: the distortion of the weights rises while that of the outputs falls."""
    W, H = problem()
    gptq, rtn = dequantize(GPTQ(bits).solve(W, H)), dequantize(Grid(bits).quantize(W))
    assert output_distortion(W, gptq, H) < 0.6 * output_distortion(W, rtn, H)
    assert distortion(W, gptq) > 1.5 * distortion(W, rtn)


def test_codes_scale_and_zero_make_the_matrix_that_was_solved_for():
    W, H = problem()
    choices = itertools.product(("tensor", "row", 16), (False, True), ("full", "asymmetric"))
    for group, act_order, scheme in choices:
        q = GPTQ(3, scheme, group, act_order=act_order).solve(W, H)
        assert q.scale.shape == Grid(3, scheme, group).fit(W)[0].shape
        rtn = dequantize(Grid(3, scheme, group).quantize(W))
        assert q.codes.max() <= 7
        assert output_distortion(W, dequantize(q), H) < output_distortion(W, rtn, H)


def test_groups_wider_than_a_lazy_block_and_odd_ones_are_refitted_on_current_columns():
    W, H = problem(d_in=288)
    for group in (144, 96, 48, 36):
        q = GPTQ(3, group=group).solve(W, H)
        first = GPTQ(3, group="row").solve(W[:, :group], H[:group, :group])
        assert q.scale.shape == (32, 288 // group) and torch.equal(q.scale[:, :1], first.scale)
        rtn = dequantize(Grid(3, group=group).quantize(W))
        assert output_distortion(W, dequantize(q), H) < output_distortion(W, rtn, H)


def test_inputs_that_never_occurred():
    W, H = problem()
    H[7], H[:, 7] = 0, 0
    assert torch.equal(dequantize(GPTQ(3).solve(W, H))[:, 7], torch.zeros(32))
    result = feedback_quantize(W, H, rounding(), damp=0.01)
    assert torch.equal(result.Q[:, 7], (W[:, 7] / 0.7).round() * 0.7)  # the solver itself drops nothing


def test_the_factor_of_few_tokens_needs_damping():
    W, H = problem(tokens=50, d_in=96)
    H = H.float().double()
    with pytest.raises(ValueError, match="not positive definite with damp = 0.*more tokens than the 96"):
        feedback_quantize(W, H - 1e-3 * torch.eye(96), rounding(), damp=0)
    U = inverse_factor(H, 0.01)
    torch.testing.assert_close(torch.linalg.inv(U.T @ U), damped(H, 0.01), rtol=1e-8, atol=1e-10)


def test_nothing_that_was_given_changes():
    W, H = problem()
    before = W.clone(), H.clone()
    GPTQ(2, group=16).solve(W, H)
    GPTQ(2, group=16, act_order=True).solve(W, H)
    damped(H, 0.5)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


def test_bad_input_is_refused():
    W, H = problem(4, 12)
    solve = lambda W=W, H=H, **kw: feedback_quantize(W, H, rounding(), **kw)
    for call, message in [
        (lambda: solve(W=W[0]), "W must be a finite floating-point matrix"),
        (lambda: solve(W=W * torch.nan), "W must be a finite floating-point matrix"),
        (lambda: solve(W=W.int()), "W must be a finite floating-point matrix"),
        (lambda: solve(H=H[:5]), r"H must be finite, \[12, 12\]"),
        (lambda: solve(H=H * torch.inf), "H must be finite"),
        (lambda: solve(vdim=5), "vdim must be a divisor of d_in = 12"),
        (lambda: solve(vdim=4, lazy=6), "lazy must be a multiple of vdim = 4"),
        (lambda: solve(damp=-1.0), "damp must be a number >= 0"),
        (lambda: solve(damp=float("nan")), "damp must be a number >= 0"),
        (lambda: solve(order=torch.zeros(12, dtype=torch.long)), r"order must be a permutation of 0\.\.11"),
        (lambda: solve(order=torch.arange(12), vdim=2, lazy=2), r"order must be a permutation of 0\.\.5"),
        (lambda: by_diagonal(H, 5), "vdim must be a divisor of 12"),
        (lambda: GPTQ(3, damp=-0.1), "damp must be a number >= 0"),
        (lambda: GPTQ(3).solve(W, H[:5]), r"H must be \[12, 12\]"),
        (lambda: GPTQ(3, group=5).solve(W, H), "group must divide d_in = 12"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
