"""Whole models: what is collected, in which order, what is replaced, and what is refused."""

import copy
import math

import pytest
import torch
from quantization_runs import IDS, logits, shallow
from torch import nn

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.corpus import topics
from refimpl.lora import add_lora
from refimpl.quantization import (
    GPTQ,
    RTN,
    GridLinear,
    calibrate,
    collect,
    compress_model,
    compressed_names,
    replace_linear,
    stats_of,
    untie_head,
)
from refimpl.quantization.calibrate import Hidden, input_groups
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import dense_weight

RECIPES = {"rtn": RTN(4, group=8), "gptq": GPTQ(4, group=8), "act-order": GPTQ(3, "full", 8, act_order=True)}


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_those_of_all_tokens_however_they_come():
    X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(6, 3)
    stats = collect({"fc": layer}, lambda: [layer(X[:8].view(2, 4, 6)), layer(X[8:])], keep=11)["fc"]
    x = X.double()
    torch.testing.assert_close(stats.H, 2 / 40 * x.T @ x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stats.sqnorm, x.square().sum(0))
    torch.testing.assert_close(stats.absmean, x.abs().mean(0))
    assert torch.equal(stats.absmax, x.abs().amax(0)) and stats.tokens == 40 and torch.equal(stats.X, X[:11])
    assert stats_of(X).X is None and torch.equal(stats_of(X).absmax, stats.absmax)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_seen_with_the_inputs_of_the_model_itself(family):
    model = tiny(family)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            keep = lambda _, x, name=name: inputs.__setitem__(name, x[0].flatten(0, 1))
            module.register_forward_pre_hook(keep)
    logits(model)
    inputs.pop("lm_head")
    model = tiny(family)
    stats = calibrate(model, IDS, batch=4)
    assert stats.keys() == inputs.keys()
    for name, x in inputs.items():
        torch.testing.assert_close(stats[name].H, stats_of(x).H, rtol=1e-4, atol=1e-5)
    groups = [group for l in range(3) for group in input_groups(Backbone(model), l)]
    assert [len(group) for group in groups] == [1, 1, 1, 1] * 3 if family == "gpt2" else [3, 1, 2, 1] * 3
    assert all(stats[name] is stats[group[0]] for group in groups for name in group)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_prefix_is_compressed_or_it_is_not(sequential):
    """The last layer's statistics are those of a model that is compressed up to it, or not at all."""
    seen = {}

    def recipe(name, weight, stats):
        seen[name] = stats.H
        return RTN(2, group=8)(name, weight, stats)

    model, plain = tiny("llama"), tiny("llama")
    compress_model(model, recipe, IDS, sequential=sequential)
    last = "model.layers.2.mlp.down_proj"
    reference = model if sequential else plain  # what `last` itself is does not matter for its input
    expected = collect({"it": reference.get_submodule(last)}, lambda: logits(reference))["it"].H
    torch.testing.assert_close(seen[last], expected, rtol=1e-4, atol=1e-4)
    assert list(seen) == list(dict.fromkeys(ref.name for ref in Backbone(plain).linears()))


# --- identity and effect --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [RTN(8, group=4), GPTQ(8, group=4)], ids=["rtn", "gptq"])
def test_with_enough_bits_it_is_the_plain_model(family, recipe):
    model = shallow(family)
    before = logits(model)
    report = compress_model(model, recipe, IDS)
    eight = (logits(model) - before).std()
    assert eight < 0.02 * before.std()
    two = shallow(family)
    compress_model(two, type(recipe)(2, group=4), IDS)
    assert (logits(two) - before).std() > 10 * eight
    assert {row.name for row in report.rows} == set(compressed_names(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_compressed_model_is_the_plain_model_with_the_dequantized_weights(family, name):
    model, plain = (shallow(family, num_hidden_layers=2) for _ in range(2))
    report = compress_model(model, RECIPES[name], IDS)
    for row in report.rows:
        layer, old = model.get_submodule(row.name), plain.get_submodule(row.name)
        assert isinstance(layer, GridLinear) and row.nbytes == layer.nbytes()
        with torch.no_grad():
            dense_weight(old).copy_(layer.weight)
        assert (layer.bias is None) == (old.bias is None)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    generated = model.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, plain.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_of_the_outputs_and_more_of_the_weights(bits):
    errors = {}
    for recipe in (RTN(bits), GPTQ(bits)):  # not sequential: one H for both
        report = compress_model(shallow("llama"), recipe, random_ids(16, 32), sequential=False)
        errors[type(recipe)] = report
    for rtn, gptq in zip(errors[RTN].rows, errors[GPTQ].rows, strict=True):
        assert gptq.output_error < rtn.output_error
    assert errors[GPTQ].weight_error > errors[RTN].weight_error


def test_gptq_beats_rounding_in_perplexity_at_three_bits(bundled):
    """One cell of the stored grid, small: texts of one kind, a third of the tokens."""
    model, tokenizer = bundled("llama-nano")
    rows = {}
    for split, n in (("calibration", 12), ("test", 8)):
        texts = [text for text in topics(split).documents if len(text) > 1500][:n]
        rows[split] = torch.tensor([[0, *tokenizer(text[:1500])["input_ids"]][:128] for text in texts])

    def perplexity(m):
        logp = logits(m, rows["test"])[:, :-1].log_softmax(-1)
        return math.exp(-logp.gather(-1, rows["test"][:, 1:, None]).mean())

    found = {"plain": perplexity(model)}
    for recipe in (RTN(3), GPTQ(3)):
        compressed = copy.deepcopy(model)
        compress_model(compressed, recipe, rows["calibration"])
        found[type(recipe).__name__] = perplexity(compressed)
    assert found["plain"] < found["GPTQ"] < found["RTN"], found


# --- ties and bad input ---------------------------------------------------------------------------


def test_a_tied_head_is_refused_until_it_is_untied():
    for family in FAMILIES:
        model = shallow(family)
        before = logits(model)
        with pytest.raises(ValueError, match="lm_head shares its weight with .*untie_head"):
            compress_model(model, RTN(8, group=4), IDS, head=True)
        assert not compressed_names(model) and torch.equal(logits(model), before)
        embedding = model.get_input_embeddings().weight.clone()
        untie_head(model)
        assert torch.equal(logits(model), before)
        report = compress_model(model, RTN(8, group=4), IDS, head=True)
        assert report.rows[-1].name == "lm_head"
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert (logits(model) - before).std() < 0.02 * before.std()
        with pytest.raises(ValueError, match="no head that is tied"):
            untie_head(tiny("llama", tie_word_embeddings=False))


def test_bad_input_is_refused_before_anything_changes():
    model = tiny("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    good, seven = RTN(4, group=8), RTN(4, group=7)
    up = "model.layers.0.mlp.up_proj"
    other = GridLinear.pack(Grid(4).quantize(torch.ones(3, 4)), 4)
    for call, error, message in [
        (lambda: compress_model(nn.Linear(2, 2), good, IDS), TypeError, "Linear is not"),
        (lambda: compress_model(model, good, IDS[:0]), ValueError, "ids: expected a non-empty LongTensor"),
        (lambda: compress_model(model, good, IDS.float()), ValueError, "expected a non-empty LongTensor"),
        (lambda: compress_model(model, good, IDS + 100), ValueError, "leave the vocabulary"),
        (lambda: compress_model(model, good, IDS, batch=0), ValueError, "batch must be"),
        (lambda: compress_model(model, good, IDS, keep=-1), ValueError, "keep must be"),
        (lambda: calibrate(model, IDS, keep=1.5), ValueError, "keep must be"),
        (lambda: compress_model(model, RTN(4, group=16), IDS), ValueError, "must divide d_in = 40, got 16"),
        (lambda: compress_model(model, seven, IDS), ValueError, "group must divide d_in = 32, got 7"),
        (lambda: collect({"fc": nn.Linear(2, 2)}, lambda: None), ValueError, "fc was not called"),
        (lambda: stats_of(torch.full((2, 2), torch.nan)), ValueError, "inputs must be finite"),
        (lambda: stats_of(torch.zeros(0, 2)), ValueError, "inputs must be finite"),
        (lambda: replace_linear(model, "model.norm", other), TypeError, "must be an nn.Linear or Conv1D"),
        (lambda: replace_linear(model, up, other), ValueError, "layer must be .40, 32."),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    compress_model(model, good, IDS)
    before = logits(model)
    with pytest.raises(TypeError, match="got GridLinear"):
        compress_model(model, good, IDS)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="ids"):
        Hidden(Backbone(model), IDS.float())


def test_a_model_with_lora_is_refused_before_its_factors_are_lost():
    model = tiny("llama")
    add_lora(model, ["q_proj"], rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    before = logits(model)
    with pytest.raises(ValueError, match="LoRA"):
        compress_model(model, RTN(4, group=8), IDS)
    assert torch.equal(logits(model), before)


def test_lora_trains_on_top_of_compressed_layers():
    model = tiny("llama")
    compress_model(model, RTN(4, group=8), IDS)
    before = logits(model)
    add_lora(model, ["q_proj", "down_proj"], rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(model), before)
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 12 and all(".lora." in name for name in trained)
