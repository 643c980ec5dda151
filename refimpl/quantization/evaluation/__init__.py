"""The evaluations of compressed models that papers have made, as protocols that run on the book's models."""

from refimpl.quantization.evaluation.beyond_perplexity import compare_safety, safety_probe
from refimpl.quantization.evaluation.llm_kick import book_items, compare_knowledge
from refimpl.quantization.evaluation.llmc import quantize, vary
from refimpl.quantization.evaluation.llmcbench import benchmark, cost_tracks, flops_per_token
from refimpl.quantization.evaluation.long_context import LargestGroups, compare_contexts, needle_items
from refimpl.quantization.evaluation.strategies import (
    compare_at_equal_bytes,
    compare_strategies,
    from_grid,
    measure_strategy,
)

__all__ = [
    "LargestGroups", "benchmark", "book_items", "compare_at_equal_bytes", "compare_contexts",
    "compare_knowledge", "compare_safety", "compare_strategies", "cost_tracks", "flops_per_token",
    "from_grid", "measure_strategy", "needle_items", "quantize", "safety_probe", "vary",
]  # fmt: skip
