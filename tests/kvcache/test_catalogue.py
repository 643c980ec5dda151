"""The catalogue: every row can be built, runs, and holds what its closed form says."""

import tomllib
from pathlib import Path

import pytest
import torch
from cache_runs import LONG

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache.catalogue import AXES, BUDGETS, METHODS, applicable, build, dominated, table
from refimpl.kvcache.recipes import Setting
from refimpl.kvcache.sizes import held_bytes

RUNNABLE = [name for name, row in METHODS.items() if row.recipe and not row.trained]
SELECTING = [n for n in RUNNABLE if METHODS[n].axis in AXES[:2] and n not in ("full", "fastgen")]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", num_hidden_layers=4, head_dim=16, **LONG)


@pytest.mark.parametrize("name", RUNNABLE)
def test_bytes_equal_the_closed_form(llama, name):
    row = METHODS[name]
    for f in (row.budgets[0], row.budgets[-1]):
        cache = build(name, Setting(llama, 96, f, punctuation=(13, 14)))
        with torch.no_grad():
            llama(random_ids(2, 96), past_key_values=cache)
            measured = sum(cache.nbytes().values())
            assert measured == held_bytes(cache, llama, row.size), f"{name} at {f}"
            logits = llama(random_ids(2, 1), past_key_values=cache).logits
        assert torch.isfinite(logits).all() and cache.seen == 97
        assert sum(cache.read_bytes().values()) > 0


@pytest.mark.parametrize(
    "name", [n for n in RUNNABLE if METHODS[n].axis in AXES[:2] and n not in ("full", "fastgen")]
)
def test_a_smaller_budget_holds_less(llama, name):
    held = []
    for f in (1 / 2, 1 / 8):
        cache = build(name, Setting(llama, 128, f))
        with torch.no_grad():
            llama(random_ids(1, 128), past_key_values=cache)
        held.append(cache.nbytes()["payload"])
    assert held[1] < 0.6 * held[0]


def test_gpt2_gets_what_is_defined_for_it():
    gpt2 = tiny("gpt2", n_positions=512, max_position_embeddings=512)
    names = [name for name in RUNNABLE if applicable(name, gpt2)]
    assert "h2o" in names and "streaming_llm" not in names and "lacache" not in names
    for name in ("h2o", "snapkv", "kcache"):
        with torch.no_grad():
            gpt2(random_ids(1, 48), past_key_values=build(name, Setting(gpt2, 48, 0.5)))


def test_every_system_of_the_chapter_is_in_the_map():
    rows = tomllib.loads((Path(__file__).parents[2] / "refimpl" / "systems.toml").read_text())["kvcache"]
    titles = " ".join(row.title.lower() for row in METHODS.values())
    text = table()
    for name in ("streaming", "h2o", "scissorhands", "tova", "snapkv", "pyramidkv", "dynamickv", "fastgen",
                 "lacache", "dynamic context pruning", "d2o", "minicache", "kivi", "minikv", "svd", "lorc",
                 "latent", "kcache", "quest", "tailorkv", "retrieval", "window", "random"):  # fmt: skip
        assert name in titles, name
    assert rows and all(f"| {row.title} |" in text for row in METHODS.values())
    assert {row.axis for row in METHODS.values()} == set(AXES)
    assert len(text.splitlines()) == len(METHODS) + 2
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_dominated_points():
    assert dominated([(1, 1), (1, 1), (2, 1), (0.5, 3)]) == [False, False, True, False]


def test_what_is_refused(llama):
    with pytest.raises(ValueError, match="name: 'h3o'; allowed: full, window"):
        build("h3o", Setting(llama, 8, 1.0))
    with pytest.raises(ValueError, match="name: 'mla'"):
        build("mla", Setting(llama, 8, 1.0))
    with pytest.raises(ValueError, match=r"f: 0\.3; allowed for h2o"):
        build("h2o", Setting(llama, 8, 0.3))
    with pytest.raises(ValueError, match="pruning: None"):
        build("dynamic_context_pruning", Setting(llama, 8, 1.0))
    for n, f, name in ((0, 1.0, "n: 0"), (8, 0.0, "f: 0"), (8, 1.5, "f: 1.5"), (8, float("nan"), "f: nan")):
        with pytest.raises(ValueError, match=name):
            Setting(llama, n, f)
    assert set(BUDGETS) >= {f for row in METHODS.values() for f in row.budgets}
