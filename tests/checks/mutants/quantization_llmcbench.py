"""Plausible but wrong benchmarks that the checks of LLMCBench must reject."""

import math

from torch import nn

from refimpl.quantization.evaluation.llmcbench import Bench, benchmark, flops_per_token


def _with(ratio, mean):
    def bench(dense, methods):
        benchmark(dense, methods)
        ratios = {
            name: {t: {k: ratio(entry[t][k], dense[t][k]) for k in tasks} for t, tasks in dense.items()}
            for name, entry in {"dense": dense, **methods}.items()
        }
        table = {n: {t: mean(list(v.values())) for t, v in row.items()} for n, row in ratios.items()}
        return Bench(ratios, table)

    return bench


def _right(new, dense):
    return dense.value / new.value if new.less_is_better else new.value / dense.value


def _off(new, dense):
    """Switched off: nothing is set against the dense model, so that all methods are alike."""
    return 1.0


def _inverted(new, dense):
    return new.value / dense.value if new.less_is_better else dense.value / max(new.value, 1e-9)


def _never_turned(new, dense):
    return new.value / dense.value


def _rms(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


def fewer_by_bits(model, context=1):
    """A layer in b bits counts b / 16 of its FLOPs."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and hasattr(m, "bits_per_weight")]
    saved = sum(2 * m.in_features * m.out_features * (1 - m.bits_per_weight / 16) for m in linear)
    return int(flops_per_token(model, context) - saved)


def fewer_by_zeros(model, context=1):
    """Zeros are not counted, though they are multiplied."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    zeros = sum(int((m.weight == 0).sum()) for m in linear)
    return flops_per_token(model, context) - 2 * zeros


def half(model, context=1):
    """A multiplication and an addition as one."""
    return flops_per_token(model, context) // 2


MUTANTS = [
    ("llmcbench", "off: every method is as good as the dense model", _with(_off, _rms)),
    ("llmcbench", "the first task stands for its track", _with(_right, lambda v: v[0])),
    ("llmcbench", "all ratios are inverted", _with(_inverted, _rms)),
    ("llmcbench", "less is never better", _with(_never_turned, _rms)),
    ("llmcbench", "the arithmetic mean of ratios", _with(_right, lambda v: sum(v) / len(v))),
    ("llmcbench", "the sum is not divided", _with(_right, lambda v: math.sqrt(sum(x * x for x in v)))),
    ("executed_flops", "weight-only quantization lowers FLOPs", fewer_by_bits),
    ("executed_flops", "zeros that are multiplied do not count", fewer_by_zeros),
    ("executed_flops", "multiply-adds instead of FLOPs", half),
]
