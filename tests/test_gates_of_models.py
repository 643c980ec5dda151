"""The shipped weights do what their stored gates say, recomputed here on fewer items."""

from __future__ import annotations

import pytest

from refimpl.models import evaluation, load
from refimpl.world.gates import agrees, evaluate_gates

CHEAP = {
    "llama-nano": (
        "qa", "recall_16", "facts_seen", "facts_held_out", "facts_unseen", "induction_head", "canaries",
    ),
    "llama-nano-clean": ("facts_seen", "canaries"),
    "llama-mini": ("qa", "recall_16", "induction_gain"),
    "gpt2-mini": ("recall_16", "facts_seen", "induction_gain"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHEAP))
def test_quick_gates_agree_with_the_stored_ones(name):
    model, tokenizer = load(name)
    stored = {gate["metric"]: gate for gate in evaluation(name)["gates"]}
    found = evaluate_gates(model, tokenizer, name, quick=True, max_tokens=2048, only=CHEAP[name])
    assert {r.metric for r in found} == set(CHEAP[name])
    wrong = [(r.metric, r.value, stored[r.metric]["value"]) for r in found if not agrees(r, stored[r.metric])]
    assert not wrong, f"metric, measured now, stored: {wrong}"
