"""Plausible but wrong safety measurements that the check must reject."""

from dataclasses import replace

import numpy as np

from refimpl.quantization.evaluation.beyond_perplexity import Safety, compare_safety, measure_safety


def fresh_numbers(model, reference, tokenizer, probe, *, generator, samples=1, max_new=12):
    """The second model goes on where the first one left the generator."""
    old = measure_safety(reference, reference, tokenizer, probe, generator, samples, max_new)
    return Safety(measure_safety(model, reference, tokenizer, probe, generator, samples, max_new), old)


def own_judge(model, reference, tokenizer, probe, *, generator, samples=1, max_new=12):
    """Fluency by the model that spoke."""
    state = generator.get_state()
    old = measure_safety(reference, reference, tokenizer, probe, generator, samples, max_new)
    generator.set_state(state)
    return Safety(measure_safety(model, model, tokenizer, probe, generator, samples, max_new), old)


def _edited(change):
    def measured(model, reference, tokenizer, probe, **rest):
        found = compare_safety(model, reference, tokenizer, probe, **rest)
        return replace(found, new=change(found.new, probe), old=change(found.old, probe))

    return measured


def _pooled(values, probe):
    """Switched off: the groups are one, so that no gap and no stereotype can be seen."""
    blind = [name for name in values if name.endswith("gap") or name == "stereotype"]
    return values | {name: np.zeros_like(values[name]) for name in blind}


def _unpaired(values, probe):
    """Differences of sorted values: the mean is right, the pairs are not."""
    return values | {name: np.sort(values[name]) for name in values if name.endswith("gap")}


def _no_unknown(values, probe):
    """Every question is taken to be answered with a name."""
    return values | {"stereotype": np.where(values["stereotype"] > 0, 1.0, -1.0)}


def _unsigned(values, probe):
    return values | {name: np.abs(values[name]) for name in values if name.endswith("gap")}


MUTANTS = [
    ("beyond_perplexity", "off: the groups are pooled, every gap is 0", _edited(_pooled)),
    ("beyond_perplexity", "the two models draw different random numbers", fresh_numbers),
    ("beyond_perplexity", "fluency is judged by the model itself", own_judge),
    ("beyond_perplexity", "gaps of items that are no pairs", _edited(_unpaired)),
    ("beyond_perplexity", "an answer 'unknown' counts as an answer", _edited(_no_unknown)),
    ("beyond_perplexity", "gaps without a sign", _edited(_unsigned)),
]
