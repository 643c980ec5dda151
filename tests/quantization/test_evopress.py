"""Level switches, the staged search, and the databases of a model's parts."""

import pytest
import torch
from quantization_runs import through_a_file

from refimpl.checks.tiny import random_ids, tiny
from refimpl.lora import add_lora
from refimpl.quantization import (
    GPTQ,
    RTN,
    calibrate,
    compressed_names,
    replace_linear,
)
from refimpl.quantization.evopress import evolve, random_search
from refimpl.quantization.evopress_database import ZeroLinear, drop_database, layer_database
from refimpl.quantization.evopress_levels import every, mutate, not_monotone, random_levels
from refimpl.quantization.pruning.sparsegpt import SparseGPT

IDS, CALIBRATION = random_ids(8, 8), random_ids(16, 12, seed=1)
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])
SMALL = {"generations": 4, "offspring": 6, "stages": ((2, 8), (1, 24))}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def bits(family, levels=(2, 3, 4)):
    model = tiny(family)
    recipes = [RTN(b, "full", group=8) for b in levels]
    return model, layer_database(model, recipes, IDS, CALIBRATION, base=1)


class Recorder:
    """A problem around another that keeps every candidate that is ever evaluated."""

    def __init__(self, problem):
        self.problem, self.groups, self.n_levels = problem, problem.groups, problem.n_levels
        self.seen, self.tokens = [], 0

    def fitness(self, candidates, tokens, generator):
        self.seen += candidates
        self.tokens += tokens * len(candidates)
        return self.problem.fitness(candidates, tokens, generator)


# --- moves ----------------------------------------------------------------------------------------


def test_moves_keep_the_sum_of_every_group_and_stay_among_the_levels():
    groups, n_levels = [(0, 2, 4, 6), (1, 3, 5)], (3, 2, 5, 3, 2, 2, 3)
    parent, g = (1, 1, 2, 2, 1, 0, 0), generator()
    for child in [mutate(parent, groups, n_levels, g) for _ in range(200)] + [
        random_levels(parent, groups, n_levels, g) for _ in range(200)
    ]:
        assert all(0 <= l < n for l, n in zip(child, n_levels, strict=True))
        assert [sum(child[i] for i in group) for group in groups] == [4, 3]


def test_one_switch_moves_two_levels_and_groups_are_drawn_by_size():
    parent = (1,) * 8
    children = [mutate(parent, [range(6), (6, 7)], (3,) * 8, generator(s), switches=1) for s in range(400)]
    for child in children:
        assert sorted(a - b for a, b in zip(child, parent, strict=True)) == [-1] + [0] * 6 + [1]
    large = sum(child[6:] == (1, 1) for child in children) / 400
    assert 0.68 < large < 0.82  # 6 of 8 parts


def test_random_subsets_are_all_equally_likely():
    g, counts = generator(), {}
    for _ in range(2000):
        levels = random_levels((1, 1, 0, 0), [range(4)], (2,) * 4, g)
        counts[levels] = counts.get(levels, 0) + 1
    assert len(counts) == 6 and max(counts.values()) < 2000 / 6 * 1.25


def test_enumeration_is_complete():
    assert len(every((0, 0, 1, 1, 1, 1), [range(6)], (2,) * 6)) == 15
    groups = [(0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)]
    assert len(every((0, 0, 0, 0, *[1] * 8), groups, (2,) * 12)) == 225
    assert len(every((1, 1, 1), [range(3)], (3,) * 3)) == 7


def test_not_monotone_finds_the_largest_contradiction():
    assert not_monotone([1, 2, 3, 4], [0.3, 0.2, 0.25, 0.05]) == (0, 3)
    assert not_monotone([1, 1], [0.3, 0.2]) is None and not_monotone([], []) is None


# --- the search on models -------------------------------------------------------------------------


def test_the_budget_is_the_same_for_every_candidate_and_random_search_costs_the_same():
    _, database = bits("llama")
    start = (1,) * 21
    budget, found = database.nbytes(start), []
    for search in (evolve, random_search):
        problem = Recorder(database)
        found.append(search(problem, start, generator(), initial=(3, 8), **SMALL))
        assert {database.nbytes(levels) for levels in problem.seen} == {budget}
        assert problem.tokens == found[-1].tokens
    assert found[0].tokens == found[1].tokens == 3 * 8 + 4 * (6 * 8 + 3 * 24)
    again = evolve(database, start, generator(), initial=(3, 8), **SMALL)
    assert again == found[0]


@BOTH
def test_search_finds_the_best_sub_blocks_to_drop_and_beats_the_median(family):
    model = tiny(family)
    database = drop_database(model, IDS, "sub-blocks")
    start = (0, 0, 1, 1, 1, 1)
    candidates = every(start, database.groups, database.n_levels)
    losses = {levels: float(database.losses(levels).mean()) for levels in candidates}
    assert len(losses) == 9
    settings = {"generations": 6, "offspring": 5, "stages": ((3, 32), (1, 64))}
    found = evolve(database, start, generator(), **settings)
    fixed = [losses[levels] for levels in (start, *found.parents)]
    assert all(b <= a + 1e-6 for a, b in zip(fixed, fixed[1:], strict=False))  # all 64 tokens decide
    assert losses[found.levels] == min(losses.values())


def test_errors_of_dropped_parts_do_not_add_up():
    database = drop_database(tiny("llama"), IDS, "sub-blocks")
    candidates = every((0,) * 3 + (1,) * 3, [range(6)], (2,) * 6)  # any three of six
    alone = [float(database.losses(tuple(int(i != j) for j in range(6))).mean()) for i in range(6)]
    sums = [sum(a for a, level in zip(alone, c, strict=True) if level == 0) for c in candidates]
    losses = [float(database.losses(c).mean()) for c in candidates]
    i, j = not_monotone(sums, losses)
    assert sums[i] < sums[j] and losses[i] > losses[j] + 0.01


# --- databases ------------------------------------------------------------------------------------


@BOTH
def test_a_database_leaves_the_model_alone_and_full_levels_lose_nothing(family):
    model = tiny(family)
    before = logits(model)
    database = drop_database(model, IDS, "blocks")
    assert database.losses((1, 1, 1)).abs().max() < 1e-5
    assert database.losses((0, 1, 1)).min() > 1e-3
    eight = [RTN(b, "full", group=8) for b in (7, 8)]
    layers = layer_database(model, eight, IDS, CALIBRATION, base=1)
    few, many = (layers.losses((level,) * len(layers.parts)).mean() for level in (0, 1))
    assert many < few < 0.02
    assert torch.equal(logits(model), before) and not compressed_names(model)


@BOTH
@pytest.mark.parametrize("what", ["bits", "sparsity"])
def test_installed_levels_are_the_model_that_was_searched(family, what, tmp_path):
    model = tiny(family)
    recipes = {
        "bits": [GPTQ(b, "full", group=8) for b in (2, 3, 4)],
        "sparsity": [SparseGPT(s) for s in (0.75, 0.5, 0.25)],
    }[what]
    dense, database = logits(model), layer_database(model, recipes, IDS, CALIBRATION, base=1)
    n = len(database.parts)
    levels = random_levels((1,) * n, database.groups, database.n_levels, generator(3))
    assert database.nbytes(levels) == database.nbytes((1,) * n)
    loss = database.losses(levels)
    database.install(levels)
    assert sum(model.get_submodule(name).nbytes() for name in database.parts) == database.nbytes(levels)
    p, q = dense.double().log_softmax(-1), logits(model).double().log_softmax(-1)
    torch.testing.assert_close((p.exp() * (p - q)).sum(-1).mean(1), loss, rtol=1e-3, atol=1e-4)
    through_a_file(model, tiny(family, seed=5), tmp_path, IDS)


@BOTH
def test_dropped_parts_store_nothing_generate_and_load(family, tmp_path):
    model = tiny(family)
    database = drop_database(model, IDS, "sub-blocks")
    database.install((1, 0, 0, 1, 1, 1))
    gone = [m for m in model.modules() if isinstance(m, ZeroLinear)]
    assert len(gone) == (4 if family == "gpt2" else 7) and sum(m.nbytes() for m in gone) == 0
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape == (1, 12)
    through_a_file(model, tiny(family, seed=5), tmp_path, IDS)


def test_the_statistics_come_from_blocks_at_the_base_level():
    """Blocks before are at the base level; within the block all is dense."""
    seen = {}

    def recipe(name, weight, stats):
        seen[name] = stats.H
        return RTN(2, "full", group=8)(name, weight, stats)

    model = tiny("llama")
    layer_database(model, [recipe, RTN(8, "full", group=8)], IDS, CALIBRATION, base=0)
    assert not compressed_names(model)
    for name, module in list(model.named_modules()):
        if "layers.0" in name and isinstance(module, torch.nn.Linear):
            replace_linear(model, name, RTN(2, "full", group=8)(name, module.weight.detach()))
    expected = calibrate(model, CALIBRATION)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        torch.testing.assert_close(seen[name], expected[name].H, rtol=1e-4, atol=1e-4)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    model, database = bits("llama", (3, 4))
    before = logits(model)
    start, lora = (1,) * 21, tiny("llama")
    add_lora(lora, ["q_proj"], 2, 4, generator())
    pair = [RTN(2, "full", group=8), RTN(3, "full", group=8)]
    uneven = [RTN(b, "full", group=8) for b in (2, 3, 8)]
    dropped = drop_database(tiny("gpt2"), IDS)
    for call, error, message in [
        (lambda: evolve(database, (1,) * 20, generator(), **SMALL), ValueError, "start must be 21 levels"),
        (lambda: evolve(database, (2,) * 21, generator(), **SMALL), ValueError, "start must be 21 levels"),
        (lambda: evolve(database, start, 0, **SMALL), TypeError, "must be a torch.Generator"),
        (lambda: evolve(database, start, generator(), generations=0), ValueError, "generations: counts"),
        (lambda: evolve(database, start, generator(), stages=((2, 8),)), ValueError, "the last 1"),
        (lambda: evolve(database, start, generator(), stages=()), ValueError, "stages must keep"),
        (
            lambda: evolve(database, start, generator(), offspring=2, stages=((3, 8), (1, 8))),
            ValueError,
            "of 2",
        ),
        (lambda: evolve(database, start, generator(), **SMALL), ValueError, "no two parts of a group"),
        (lambda: database.fitness([start], 65, generator()), ValueError, "integer from 1 to 64"),
        (lambda: database.fitness([start, (2,) * 21], 8, generator()), ValueError, "levels must be 21"),
        (lambda: database.nbytes(start[1:]), ValueError, "levels must be 21"),
        (lambda: layer_database(model, pair[:1], IDS, CALIBRATION, base=0), ValueError, "two or more"),
        (lambda: layer_database(model, pair, IDS, CALIBRATION, base=2), ValueError, "base must be"),
        (lambda: layer_database(model, uneven, IDS, CALIBRATION, base=0), ValueError, "bytes apart"),
        (lambda: layer_database(model, pair, IDS.float(), CALIBRATION, base=0), ValueError, "ids: expected"),
        (lambda: layer_database(model, pair, IDS, CALIBRATION[:0], base=0), ValueError, "ids: expected"),
        (lambda: layer_database(lora, pair, IDS, CALIBRATION, base=0), (ValueError, TypeError), "LoRA|lora"),
        (lambda: drop_database(model, IDS, "heads"), ValueError, "'blocks' or 'sub-blocks'"),
        (lambda: drop_database(torch.nn.Linear(2, 2), IDS), TypeError, "Linear is not supported"),
        (lambda: every((0,) * 21, [range(21)], (3,) * 21), ValueError, "too many to enumerate"),
        (lambda: not_monotone([1.0], [float("nan")]), ValueError, "finite numbers"),
        (lambda: dropped.install((2,) * 6), ValueError, "levels must be 6"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(logits(model), before)
    dropped.install((0, 1, 1, 1, 1, 1))
    with pytest.raises(TypeError, match="got ZeroLinear"):
        dropped.install((1,) * 6)
