"""The evaluation protocols: nothing is seen where nothing is, and what is planted is found."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from refimpl.checks.tiny import random_ids, tiny
from refimpl.quantization import GPTQ, RTN, compress_model, load_compressed, save_compressed
from refimpl.quantization.awq import awq
from refimpl.quantization.evaluation import beyond_perplexity as beyond
from refimpl.quantization.evaluation import llm_kick as kick
from refimpl.quantization.evaluation import llmc, llmcbench, long_context, strategies
from refimpl.quantization.evaluation.llmcbench import Quantity
from refimpl.quantization.evaluation.long_context import LargestGroups
from refimpl.quantization.harness import Measured, Probe, measure
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.pruning.unstructured import Magnitude
from refimpl.quantization.texts import calibration_ids
from refimpl.world.groups_dialects import GROUPS

RNG = np.random.default_rng(0)
PROBE = Probe(
    {"stories": random_ids(4, 16)},
    {name: [(row[:4], row[4:5]) for row in random_ids(6, 5, seed=i).tolist()]
     for i, name in enumerate(("known", "rare", "context"))},
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from refimpl.models import load

    return load("llama-nano")[1]


def worded(family="llama"):
    """A tiny random model that can read the tokenizer's texts."""
    return tiny(family, vocab_size=4096, max_position_embeddings=1024, num_hidden_layers=1)


def measured(nll, **exact):
    return Measured(
        {"stories": np.array(nll, float)}, {k: np.array(v, float) for k, v in exact.items()},
        {k: np.zeros(len(v)) for k, v in exact.items()},
    )  # fmt: skip


# --- strategies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_table_of_strategies_has_a_row_for_each_method(family):
    rows = [strategies.measure_strategy("none", family, tiny(family), PROBE)]
    for bits in (8, 4, 2):
        model = tiny(family)
        report = compress_model(model, RTN(bits, group=8), random_ids(2, 16))
        rows.append(strategies.measure_strategy(f"rtn {bits}", family, model, PROBE, tokens_per_second=7.0))
        assert rows[-1].bits == pytest.approx(report.bits)
    assert rows[0].bits == 16 and [r.nbytes for r in rows] == sorted((r.nbytes for r in rows), reverse=True)
    for row in rows:  # a random model's accuracies are all 0: plant them
        for name in row.measured.exact:
            row.measured.exact[name][: int(row.bits) // 3] = 1.0
    table = strategies.compare_strategies(rows, rng=RNG, n_boot=20)
    assert table.proxy.lo <= table.proxy.value <= table.proxy.hi and table.proxy.n == 4
    assert "knowledge & capacity" in str(table) and "rtn 2" in str(table)
    ours, same = rows[0].measured, measure(tiny(family), PROBE)
    assert np.array_equal(ours.nll["stories"], same.nll["stories"])


def test_the_larger_model_never_takes_more_bytes():
    row = lambda model, nbytes, right: strategies.Strategy(
        "x", model, 4.0, nbytes, measured([1.0], known=[right] * 3, rare=[right] * 3, context=[right] * 3)
    )
    larger = [row("big", n, r) for n, r in ((100, 0), (140, 1), (160, 0))]
    (duel,) = strategies.compare_at_equal_bytes(larger, [row("small", 150, 0), row("small", 90, 1)])
    assert duel.larger.nbytes == 140 and duel.gain.value == duel.gain.lo == 1 and "big" in str(duel)
    (same,) = strategies.compare_at_equal_bytes(larger[:1], [row("small", 100, 0)])
    assert same.gain.value == same.gain.lo == same.gain.hi == 0
    with pytest.raises(ValueError, match="more bytes than every variant"):
        strategies.compare_at_equal_bytes(larger, [row("small", 99, 0)])
    with pytest.raises(ValueError, match="'needle' was not measured"):
        strategies.compare_at_equal_bytes(larger, larger, ["needle"])


def test_rows_of_the_stored_grid_can_be_read():
    row = {"nll": {"stories": {"items": [1.0, 2.0]}}, "exact": {"known": {"items": "120"}}, "seeds": 2}
    found = strategies.from_grid(row)
    assert found.accuracy("known") == 0.5 and found.perplexity("stories") == pytest.approx(math.exp(1.5))
    grid = json.loads((Path(__file__).parents[2] / "data/results/quantization/grid.json").read_text())
    stored = grid["models"]["llama-nano"]["none"]
    assert strategies.from_grid(stored).accuracy("known") == pytest.approx(stored["exact"]["known"]["mean"])


def test_strategies_refuse_what_they_cannot_rank():
    rows = [strategies.Strategy("x", "m", 4, 1, measured([1, 2], known=[1], rare=[0]))] * 3
    for call, message in [
        (lambda: strategies.compare_strategies(rows[:2], rng=RNG), "at least 3"),
        (lambda: strategies.compare_strategies(rows, rng=RNG), "not measured on 'context'"),
        (lambda: strategies.compare_strategies(rows, {}, rng=RNG), "no set of items"),
        (lambda: strategies.compare_strategies(rows, {"a": ("known",)}, text="x", rng=RNG), "on 'x'"),
        (lambda: strategies.compare_strategies(rows, {"a": ("known",)}, rng=RNG), "there are no ranks"),
        (lambda: strategies.rank_correlation([[1.0]] * 3, [[1.0]] * 2, rng=RNG), "must be .variants"),
        (lambda: strategies.rank_correlation([[np.nan]] * 3, [[1.0]] * 3, rng=RNG), "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- LLM-KICK -------------------------------------------------------------------------------------


def test_at_equal_perplexity_the_family_that_forgets_is_found():
    dense = measured([1, 1, 1, 1], closed=[1] * 20, open=[1] * 20)
    keeps = {f"q{i}": measured([1 + i / 4] * 4, closed=[1] * 20, open=[1] * 20) for i in (1, 2, 3)}
    # Loses a fifth of its facts for every quarter of a nat, and half as many answers from the context.
    forgets = {
        f"p{i}": measured([1 + i / 4] * 4, closed=[0] * 4 * i + [1] * (20 - 4 * i),
                          open=[0] * 2 * i + [1] * (20 - 2 * i))
        for i in (3, 1, 2)
    }  # fmt: skip
    found = kick.compare_knowledge(dense, {"quantization": keeps, "pruning": forgets}, 0.375)
    assert found.closed["quantization"].value == found.closed["quantization"].hi == 0
    assert found.closed["pruning"].value == pytest.approx(0.3)
    assert found.open["pruning"].value == pytest.approx(0.15)
    assert found.memory["pruning"].value == pytest.approx(0.15)
    contrast = found.contrasts["quantization", "pruning"]
    assert contrast.hi < 0 and contrast.value == pytest.approx(-0.3)
    assert found.between["pruning"] == ("p1", "p2", pytest.approx(0.5), pytest.approx(0.25))
    assert "closed book lost" in str(found) and "0.50 of p1 and 0.50 of p2" in str(found)
    twice = kick.compare_knowledge(dense, {"a": forgets, "b": forgets}, 0.3).contrasts["a", "b"]
    assert twice.value == twice.lo == twice.hi == 0
    for call, message in [
        (lambda: kick.compare_knowledge(dense, {}, 0.1), "at least one"),
        (lambda: kick.compare_knowledge(dense, {"a": {}}, 0.1), "at least one"),
        (lambda: kick.compare_knowledge(dense, {"a": keeps}, 0.8), "at most 0.75"),
        (lambda: kick.compare_knowledge(dense, {"a": keeps}, 0.0), "must be > 0"),
        (lambda: kick.match([[1.0]], [[1.0]], np.ones(2), np.ones(1), 0.1), "of the documents and items"),
        (lambda: kick.match([[np.inf]], [[1.0]], np.ones(1), np.ones(1), 0.1), "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    other = measured([1], closed=[1] * 3, open=[1] * 4)
    with pytest.raises(ValueError, match="as many items"):
        kick.compare_knowledge(other, {"a": {"x": other}}, 0.1)


def test_the_open_book_holds_the_answer_of_the_same_question(tokenizer):
    books = kick.book_items(tokenizer, 12)
    for (closed, answer), (opened, again) in zip(books["closed"], books["open"], strict=True):
        question, told = tokenizer.decode(closed), tokenizer.decode(opened)
        assert answer == again and told.endswith(question[question.index("Question:") :])
        assert tokenizer.decode(answer).strip() in told and told.count("\n[") == 3
    assert books == kick.book_items(tokenizer, 12) != kick.book_items(tokenizer, 12, seed=1)
    for arguments, message in (((0,), "n must be"), ((10**6,), "n must be"), ((1, 0, 7), "level must be")):
        with pytest.raises(ValueError, match=message):
            kick.book_items(tokenizer, *arguments)


# --- LLMC -----------------------------------------------------------------------------------------


def recipe_of(method="GPTQ", **changes):
    recipe = copy.deepcopy(llmc.RECIPE)
    recipe["calib"] |= {"n_samples": 2, "seq_len": 32}
    recipe["quant"]["method"] = method
    recipe["quant"]["weight"]["group_size"] = 8
    recipe["quant"]["special"] |= changes
    return recipe


def weights(model):
    return torch.cat([m.weight.flatten() for m in model.modules() if hasattr(m, "bits_per_weight")])


def test_a_recipe_is_the_method_that_it_names(tokenizer):
    ids = calibration_ids(tokenizer, 2, 32)
    for recipe, apply in [
        (recipe_of("RTN"), lambda m: compress_model(m, RTN(3, group=8), ids)),
        (recipe_of("RTN", weight_clip=True), lambda m: compress_model(m, RTN(3, "asymmetric", 8, 2.0), ids)),
        (recipe_of(actorder=True), lambda m: compress_model(m, GPTQ(3, group=8, act_order=True), ids)),
        (recipe_of("Awq"), lambda m: awq(m, ids, 3, 8, ratios=(0.0,), clip=False)),
    ]:  # fmt: skip
        ours, theirs = worded(), worded()
        report = llmc.quantize(ours, tokenizer, recipe)
        apply(theirs)
        assert torch.equal(weights(ours), weights(theirs)) and 3 < report.bits < 7
    plain, scaled = worded(), worded()
    llmc.quantize(plain, tokenizer, recipe_of())
    llmc.quantize(scaled, tokenizer, recipe_of(trans=True))
    assert not torch.equal(weights(plain), weights(scaled))
    wide = recipe_of("RTN")
    wide["quant"]["weight"] |= {"granularity": "per_channel", "symmetric": True, "bit": 8}
    model, dense = worded(), worded()
    llmc.quantize(model, tokenizer, wide)
    with torch.no_grad():
        assert (model(ids).logits - dense(ids).logits).std() < 0.02 * dense(ids).logits.std()


def test_rounding_does_not_see_the_calibration_text_and_gptq_does(tokenizer):
    def run(recipe):
        model = worded()
        llmc.quantize(model, tokenizer, recipe)
        return weights(model)[::97].numpy()

    for method, sees in (("RTN", False), ("GPTQ", True)):
        for factor, values in (("calib.name", ["stories", "topics"]), ("calib.n_samples", [1, 4])):
            found = llmc.vary(run, recipe_of(method), factor, values)
            assert np.array_equal(*found.scores.values()) is not sees
            gain = found.gain(*values)
            assert sees or gain.value == gain.lo == gain.hi == 0
            assert factor in str(found)


def test_recipes_that_mean_nothing_are_refused(tokenizer):
    model = worded()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    edits = {
        "quant.method": ("AWQ", "method must be one of RTN, Awq, GPTQ"),
        "quant.weight.bit": (1, "bits must be"),
        "quant.weight.granularity": ("per_token", "granularity"),
        "quant.weight.group_size": (7, "group must divide"),
        "calib.name": ("pile", "kind must be"),
        "calib.n_samples": (0, "n must be"),
    }
    for factor, (value, message) in edits.items():
        with pytest.raises(ValueError, match=message):
            llmc.quantize(model, tokenizer, llmc.with_value(recipe_of(), factor, value))
    for recipe, message in [
        (recipe_of("RTN", actorder=True), "actorder does nothing in RTN"),
        (recipe_of("RTN", trans=True), "trans does nothing in RTN"),
        (recipe_of(blocksize=128), "quant.special must have"),
        ({"calib": {}}, "recipe must have"),
        ({"calib": 3, "quant": {}}, "calib must have"),
    ]:
        with pytest.raises(ValueError, match=message):
            llmc.quantize(model, tokenizer, recipe)
    with pytest.raises(ValueError, match="GPT-2's GELU"):
        llmc.quantize(worded("gpt2"), tokenizer, recipe_of(trans=True))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    run = lambda recipe: np.zeros(3)
    for call, message in [
        (lambda: llmc.vary(run, llmc.RECIPE, "calib.seed", [1]), "seed is not a factor"),
        (lambda: llmc.vary(run, llmc.RECIPE, "calib.bits", [1]), "must name an entry"),
        (lambda: llmc.vary(run, llmc.RECIPE, "calib.name.x", [1]), "must name an entry"),
        (lambda: llmc.vary(run, llmc.RECIPE, "calib.name", []), "must not be empty"),
        (lambda: llmc.vary(lambda r: 1.0, llmc.RECIPE, "calib.name", ["a"]), "must return .items."),
        (lambda: llmc.vary(run, llmc.RECIPE, "calib.name", ["a"]).gain("a", "b"), "tried at a, not b"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- LLMCBench ------------------------------------------------------------------------------------


def test_the_dense_model_has_one_in_every_track_and_flops_stay():
    ids, probe = random_ids(2, 16), PROBE
    dense = tiny("llama")
    base = llmcbench.used(lambda: dense(ids))
    assert base.seconds > 0

    def entry(model, compression=None):
        found = measure(model, probe)
        for exact in found.exact.values():
            exact[0] = 1.0  # a random model knows nothing, and there would be no ratio
        return {
            "performance": llmcbench.accuracies(found, ("known", "rare"), ("stories",)),
            "trustworthiness": llmcbench.accuracies(found, ("context",)),
        } | llmcbench.cost_tracks(model, ids, base, compression, repeats=1, new_tokens=2)

    model = tiny("llama")
    took = llmcbench.used(lambda: compress_model(model, RTN(4, group=8), ids))
    whole = entry(dense)
    bench = llmcbench.benchmark(whole, {"rtn 4": entry(model, took)})
    assert all(value == 1 for value in bench.overall["dense"].values())
    assert bench.ratios["rtn 4"]["inference cost"]["flops"] == 1
    assert bench.ratios["rtn 4"]["inference cost"]["bytes"] > 1.2
    assert bench.overall["rtn 4"]["compression cost"] < 1
    assert set(bench.order("speed")) == {"dense", "rtn 4"} and "inference cost" in str(bench)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_flops_are_those_that_torch_counts(family):
    model, T = tiny(family), 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_ids(1, T))
    assert counter.get_total_flops() == T * llmcbench.flops_per_token(model, T)  # it counts the whole square


def test_benchmarks_that_cannot_be_compared_are_refused():
    dense = {"speed": {"decode": Quantity(5.0)}}
    for methods, message in [
        ({"a": {"performance": {}}}, "a has the tracks"),
        ({"a": {"speed": {"prefill": Quantity(1.0)}}}, "differ in the tasks of 'speed'"),
        ({"a": {"speed": {"decode": Quantity(1.0, True)}}}, "differ in the tasks"),
        ({"a": {"speed": {"decode": Quantity(math.nan)}}}, "numbers > 0"),
        ({"dense": dense}, "name of the dense model"),
    ]:
        with pytest.raises(ValueError, match=message):
            llmcbench.benchmark(dense, methods)
    with pytest.raises(ValueError, match="numbers > 0"):
        llmcbench.benchmark({"speed": {"decode": Quantity(0.0)}}, {})
    with pytest.raises(ValueError, match="tracks are performance"):
        llmcbench.benchmark({"colour": {}}, {})
    with pytest.raises(ValueError, match="at least one"):
        llmcbench.overall({})
    with pytest.raises(ValueError, match="context must be"):
        llmcbench.flops_per_token(tiny("llama"), 0)
    with pytest.raises(ValueError, match="repeats"):
        llmcbench.cost_tracks(tiny("llama"), random_ids(1, 4), llmcbench.Usage(1.0, None), repeats=0)


# --- Beyond perplexity ----------------------------------------------------------------------------


def test_the_safety_probe_comes_in_pairs(tokenizer):
    probe = beyond.safety_probe(tokenizer, 8)
    text = lambda item: tokenizer.decode(item[0])
    for up, low in zip(probe.dialects["upland"], probe.dialects["lowland"], strict=True):
        assert up[1] == low[1] and text(up).split("Question")[1] == text(low).split("Question")[1]
        assert "Dialect: upland" in text(up) and "Dialect: lowland" in text(low)
    for a, b in zip(*(probe.told[g] for g in GROUPS), strict=True):
        assert a[1] == b[1] and a[0] != b[0]
        for group, item in zip(GROUPS, (a, b), strict=True):
            assert f"{tokenizer.decode(item[1]).strip()} is a {group}" in text(item)
    for unknown, biased, other in zip(probe.untold, *probe.names.values(), strict=True):
        assert tokenizer.decode(unknown[1]) == " unknown\n" and unknown[0] == biased[0] == other[0]
        generous = "Who is generous" in text(unknown)
        group = "Branoc" if generous else "Teldan"
        assert f"{tokenizer.decode(biased[1]).strip()} is a {group}" in text(unknown)
        assert biased[1] != other[1]
    assert len(probe.prompts) == 8 and probe.baiting.sum() == 4
    with pytest.raises(ValueError, match="n must be"):
        beyond.safety_probe(tokenizer, 1)


def test_a_model_against_itself_has_not_moved_and_a_broken_one_has(tokenizer):
    probe = beyond.safety_probe(tokenizer, 4)
    model = worded()
    generator = torch.Generator().manual_seed(3)
    start = generator.get_state()
    run = lambda m: beyond.compare_safety(
        m, model, tokenizer, probe, generator=generator, samples=2, max_new=3
    )
    same = run(model)
    assert not torch.equal(generator.get_state(), start)
    for name in same.new:
        moved = same.moved(name)
        assert moved.value == moved.lo == moved.hi == 0, name
    broken = copy.deepcopy(model)
    compress_model(broken, Magnitude(0.9), random_ids(1, 8))
    found = run(broken)
    assert found.moved("dialect nats gap").value != 0 and found.moved("fluency").value > 0
    assert "rude when provoked" in str(found) and found.before("fluency").value > 0
    with pytest.raises(ValueError, match="samples"):
        beyond.compare_safety(model, model, tokenizer, probe, generator=generator, samples=0)
    with pytest.raises(ValueError, match="paired items"):
        beyond.gap(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="three .n."):
        beyond.stereotype_values(*[np.full(2, np.nan)] * 3)


# --- Long contexts --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_long_contexts_show_nothing_of_a_model_against_itself(family, tokenizer):
    model = worded(family)
    ids = calibration_ids(tokenizer, 3, 48)
    needles = long_context.needle_items(tokenizer, (64, 96), 2)
    assert max(len(p) for p, _ in needles[96]) > max(len(p) for p, _ in needles[64])
    same = long_context.compare_contexts(model, model, ids, needles)
    assert not same.position.gaps.any() and same.position.slope.value == 0
    assert same.position.gaps.shape == (3, 47) and list(same.moved) == [64, 96]
    rough = copy.deepcopy(model)
    compress_model(rough, RTN(2, group=8), ids)
    found = long_context.compare_contexts(rough, model, ids, needles)
    assert found.position.gaps.any() and "nats per 1000 positions" in str(found)
    for call, message in [
        (lambda: long_context.needle_items(tokenizer, (32,)), "distances >= 64"),
        (lambda: long_context.needle_items(tokenizer, (64,), 0), "n must be"),
        (lambda: long_context.position_gap(np.ones((2, 3)), np.ones((3, 2))), "must be .documents"),
        (lambda: long_context.position_gap(np.ones((1, 3)), np.ones((1, 3))), "must be .documents"),
        (lambda: long_context.position_gap(np.full((2, 3), np.nan), np.ones((2, 3))), "finite"),
        (lambda: long_context.position_gap(np.ones((2, 3)), np.ones((2, 3)), 0), "n_bins"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_groups_in_more_bits_are_stored_as_they_are(family, tmp_path):
    ids = random_ids(2, 16)
    size, error = {}, {}
    for name, recipe in {
        "largest": LargestGroups(3, share=0.1, group=8),
        "random": LargestGroups(3, share=0.1, group=8, generator=torch.Generator().manual_seed(0)),
        "none": LargestGroups(3, share=0.0, group=8),
        "all": LargestGroups(3, share=1.0, group=8),
    }.items():
        model = tiny(family)
        report = compress_model(model, recipe, ids)
        size[name], error[name] = report.bytes_after, report.weight_error
        path = tmp_path / f"{name}.safetensors"
        save_compressed(model, path)
        again = tiny(family, seed=1)
        load_compressed(again, path)
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert size["largest"] == size["random"]
    assert error["all"] < error["largest"] < error["random"] < error["none"]
    first = tiny(family).get_submodule(report.rows[0].name)
    W = dense_weight(first)
    plain = RTN(3, group=8)("fc", W).weight
    assert torch.equal(LargestGroups(3, share=0.0, group=8)("fc", W).weight, plain)
    assert torch.equal(LargestGroups(3, share=1.0, group=8)("fc", W).weight, RTN(8, group=8)("fc", W).weight)


def test_mixed_groups_refuse_what_they_cannot_store():
    for arguments, message in [
        ({"low": 1}, "bits must be"), ({"high": 9}, "bits must be"), ({"share": 1.5}, "share"),
        ({"share": math.nan}, "share"), ({"group": "row"}, "group must be"), ({"group": 0}, "group must be"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LargestGroups(**arguments)
    recipe = LargestGroups(group=8)
    for W, error in [
        (torch.ones(4, 12), ValueError), (torch.full((4, 8), math.nan), ValueError),
        (torch.ones(8), ValueError), (torch.ones(4, 8, dtype=torch.long), TypeError),
    ]:  # fmt: skip
        with pytest.raises(error):
            recipe("fc", W)
