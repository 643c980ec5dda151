"""Quantization: weights in few bits; one compressed layer, one calibrator, one loop for all methods."""

from refimpl.quantization.calibrate import Stats, calibrate, collect, stats_of
from refimpl.quantization.feedback import feedback_quantize
from refimpl.quantization.fold import consumers, fold
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.grids import Grid, Quantized, dequantize
from refimpl.quantization.linear import (
    CompressedLinear,
    GridLinear,
    compressed_names,
    replace_linear,
    untie_head,
)
from refimpl.quantization.model import Report, compress_model
from refimpl.quantization.rtn import RTN
from refimpl.quantization.storage import load_compressed, save_compressed
from refimpl.quantization.symmetric import algorithm_2, distortion, output_distortion, symmetric_codes

__all__ = [
    "GPTQ", "RTN", "CompressedLinear", "Grid", "GridLinear", "Quantized", "Report", "Stats", "algorithm_2",
    "calibrate", "collect", "compress_model", "compressed_names", "consumers", "dequantize", "distortion",
    "feedback_quantize", "fold", "load_compressed", "output_distortion", "replace_linear", "save_compressed",
    "stats_of", "symmetric_codes", "untie_head",
]  # fmt: skip
