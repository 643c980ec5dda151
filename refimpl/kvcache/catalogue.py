"""One table of all methods of the chapter: notebooks, the grid, the tests and the map [75] are made from it.

The columns are the questions that the review of Shi et al. (2407.18003, [75]) puts to a method. Bytes and
reads are per row of a batch, in the letters of the chapter: n tokens of the prompt, m slots held, L layers, G
KV heads, H query heads, D head dim, e bytes of a number, f the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from refimpl.kvcache import recipes as make
from refimpl.kvcache import sizes
from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.recipes import Parts, Setting

__all__ = ["AXES", "BUDGETS", "METHODS", "Method", "build", "dominated", "table"]

AXES = (
    "which tokens stay",
    "how many per layer or head",
    "what becomes of the dropped",
    "how an entry is stored",
    "what a query reads",
)
BUDGETS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
STAY, SHARE, MERGE, STORE, READ = AXES
ROTARY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class Method(NamedTuple):
    """One row.

    Attributes: title; axis, of `AXES`; acts, when it decides; unit, what it decides about; state kept beside
    keys and values; query_aware, whether queries decide; held and read, bytes held after a prompt and read by
    a step; ref, in the survey's list or arXiv; recipe, from a `Setting` (None: no method on a cache); size,
    the closed form of `held`; budgets that it can be set to; rotary, whether it needs rotary positions;
    trained, whether it needs trained weights.
    """

    title: str
    axis: str
    acts: str
    unit: str
    state: str
    query_aware: bool
    held: str
    read: str
    ref: str
    recipe: Callable[[Setting], Parts] | None
    size: sizes.Size | None = sizes.dense
    budgets: tuple[float, ...] = BUDGETS
    rotary: bool = False
    trained: bool = False


M = Method
DENSE, ALL = "2 L G m D e", "all held"
# fmt: off
METHODS: Mapping[str, Method] = {
    "full": M("Full cache", STAY, "never", "-", "-", False, "2 L G n D e", ALL, "-", make.full,
              budgets=(1.0,)),
    "window": M("Window", STAY, "every step", "token", "-", False, DENSE, ALL, "-", make.window),
    "random": M("Random eviction", STAY, "every step", "token, per head", "4 B a slot", False,
                "L G m (2 D e + 4)", ALL, "-", make.random),
    "streaming_llm": M("StreamingLLM", STAY, "every step", "token", "-", False, DENSE, ALL,
                       "[100] 2309.17453", make.streaming_llm, rotary=True),
    "h2o": M("H2O", STAY, "every step", "token, per head", "4 B a slot", True, "L G m (2 D e + 4)", ALL,
             "[113] 2306.14048", make.h2o),
    "vatp": M("H2O with Eq. 11 (VATP)", STAY, "every step", "token, per head", "4 B a slot", True,
              "L G m (2 D e + 4)", ALL, "Eq. 11, 2406.12335", make.vatp),
    "scissorhands": M("Scissorhands", STAY, "when full, in bulk", "token, per head", "1 bit a slot and row",
                      True, "L G m (2 D e + w/8)", ALL, "2305.17118", make.scissorhands),
    "tova": M("TOVA", STAY, "every step", "token, per layer", "-", True, DENSE, ALL, "2401.06104", make.tova),
    "snapkv": M("SnapKV", STAY, "end of prefill", "token, per head", "-", True, DENSE, ALL, "2404.14469",
                make.snapkv),
    "ada_snapkv": M("AdaKV (SnapKV)", SHARE, "end of prefill", "head", "-", True, "2 L sum(m) D e", ALL,
                    "2407.11550", make.ada_snapkv),
    "pyramidkv": M("PyramidKV", SHARE, "end of prefill", "layer, by depth", "-", True, "2 G sum(m_l) D e",
                   ALL, "2406.02069", make.pyramidkv),
    "dynamickv": M("DynamicKV", SHARE, "during prefill", "layer, by attention", "-", True,
                   "2 G sum(m_l) D e", ALL, "[120] 2412.14838", make.dynamickv),
    "fastgen": M("FastGen", SHARE, "end of prefill, then every step", "head, one of five rules", "its rules",
                 True, "2 sum(m_lh) D e + state", ALL, "2310.01801", make.fastgen),
    "lacache": M("LaCache", SHARE, "when full", "layer, a ladder", "-", False, DENSE, ALL, "[74] 2507.14204",
                 make.lacache, rotary=True),
    "dynamic_context_pruning": M("Dynamic Context Pruning", STAY, "every step", "token, per layer",
                                 "small key and a flag", True, "L G m (2 D e + r e/G + 1)", ALL, "2305.15805",
                                 make.dynamic_context_pruning, budgets=(1.0,), trained=True),
    "d2o": M("D2O", MERGE, "end of prefill, then every step", "token, per head; layer", "4 B a slot", True,
             "G sum(m_l) (2 D e + 4)", ALL, "2406.13035", make.d2o),
    "minicache": M("MiniCache", MERGE, "end of prefill, then every step", "pair of layers", "slots' rows",
                   False, "upper half: (D + 2) e for 2 D e", ALL, "2405.14366", make.minicache, sizes.mini,
                   (1.0, 1 / 2)),
    "kivi": M("KIVI", STORE, "end of prefill, then in groups", "group of 32", "scale and zero", False,
              "2 L G n (D b/8 + 2 D e/g)", ALL, "2402.02750", make.kivi, sizes.kivi),
    "minikv": M("MiniKV", STORE, "end of prefill", "token, per head; layer; group of 16", "scale and zero",
                True, "2 L G m (D b/8 + 2 D e/g)", ALL, "[72] 2411.18077", make.minikv, sizes.kivi,
                BUDGETS[1:]),
    "kv_svd": M("Truncated SVD", STORE, "end of prefill", "head", "basis", False, "2 L G r (n + D) e", ALL,
                "Eq. 8-10", make.kv_svd, sizes.svd),
    "lorc": M("LoRC", STORE, "before use, in the weights", "layer", "-", False, "2 n sum(r_l) e", ALL,
              "[112] 2410.03111", make.lorc, sizes.latent),
    "mla": M("Multi-head latent attention", STORE, "in training", "layer", "-", False, "L n (r + d_R) e", ALL,
             "2405.04434", None, None, ()),
    "kcache": M("KCache", READ, "every step", "token, per query head", "values on the host", True,
                "2 L G n D e", "all keys, N values", "[30] 2404.18057", make.kcache),
    "quest": M("Quest", READ, "every step", "page of 16, per query head", "bounds of pages", True,
               "2 L G n D e (1 + 1/16)", "bounds, f n entries", "2406.10774", make.quest, sizes.quest),
    "tailorkv": M("TailorKV", READ, "every step", "layer; token, per head", "far tokens on the host", True,
                  "1 bit or 2 G n D e a layer", "near ones, 8 channels, f n entries", "[106] 2505.19586",
                  make.tailorkv, sizes.tailor),
    "retrieval_attention": M("RetrievalAttention", READ, "every step", "token, per query head",
                             "far tokens and a graph on the host", True, "2 L G n D e",
                             "near ones, keys visited, f n entries", "2409.10516", make.retrieval_attention),
}
# fmt: on


def build(name: str, setting: Setting) -> KVCache:
    """Return an empty cache of a method at a setting.

    Raises ValueError for an unknown name, a row that is no method on a cache, and a budget that the method
    has no setting for.

    >>> from refimpl.checks.tiny import tiny
    >>> build("window", Setting(tiny("llama"), n=64, f=1 / 4)).policy.recent
    16
    """
    method = METHODS.get(name)
    if method is None or method.recipe is None:
        allowed = ", ".join(key for key, row in METHODS.items() if row.recipe)
        raise ValueError(f"name: {name!r}; allowed: {allowed}")
    if setting.f not in method.budgets:
        raise ValueError(f"f: {setting.f}; allowed for {name}: {', '.join(map(str, method.budgets))}")
    return KVCache(setting.model, **method.recipe(setting))


def applicable(name: str, model: nn.Module) -> bool:
    """Whether a method is defined for a model: GPT-2 has no rotary positions."""
    return not METHODS[name].rotary or type(model).__name__ in ROTARY


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return, for points (bytes, KL), whether another is no worse in both and better in one.

    >>> dominated([(1, 5), (2, 3), (3, 4)])
    [False, False, True]
    """
    return [any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def table() -> str:
    """Return the map of the review [75] in Markdown, grouped by axis.

    >>> print(table().splitlines()[2][:48])
    | which tokens stay | Full cache | never | - | -
    """
    head = ("axis", "method", "acts", "decides about", "state", "query-aware", "bytes held", "read by a step",
            "source")  # fmt: skip
    rows = [head, tuple("---" for _ in head)]
    for axis in AXES:
        for m in (row for row in METHODS.values() if row.axis == axis):
            aware = "yes" if m.query_aware else "no"
            rows.append((axis, m.title, m.acts, m.unit, m.state, aware, m.held, m.read, m.ref))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
