"""What the chapter calibrates on and measures on: never the same text.

"stories" are the world's, "topics" are the help texts of Python itself. Calibration takes the stories of
the training split and one half of the topics; evaluation takes held-out templates and the other half.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, nn

from refimpl.corpus import topics
from refimpl.world.formats import BY_NAME
from refimpl.world.rng import Rng

__all__ = ["Kind", "calibration_ids", "document_nll", "evaluation_ids"]

Kind = Literal["stories", "topics"]


def calibration_ids(
    tokenizer: Any, n: int = 64, length: int = 256, kind: Kind = "stories", seed: int = 0
) -> LongTensor:
    """Token ids [n, length] to calibrate on, each row beginning with the end-of-text token.

    Parameters: `n` rows (GPTQ's paper: 128), `length` (its 2048; ours must fit the model's 1024); `kind`;
    `seed`, another one draws other stories (the topics come in their order, from another start).
    Raises ValueError for another kind, n < 1 or length < 2.

    >>> from refimpl.models import load
    >>> calibration_ids(load("llama-nano")[1], n=2, length=8).shape
    torch.Size([2, 8])
    """
    return _rows(tokenizer, n, length, kind, "train", seed)


def evaluation_ids(
    tokenizer: Any, n: int = 32, length: int = 512, kind: Kind = "stories", seed: int = 0
) -> LongTensor:
    """Token ids [n, length] to measure on; parameters and errors as for `calibration_ids`."""
    return _rows(tokenizer, n, length, kind, "eval", seed)


def document_nll(model: nn.Module, ids: LongTensor, batch: int = 8) -> np.ndarray:
    """Mean negative log-likelihood of every row in nats per token, [n]; exp of its mean is the perplexity.

    Differences between two models are paired: `paired_bootstrap` over the rows.
    """
    found = []
    with torch.no_grad():
        for part in ids.split(batch):
            logits = model(part.to(model.device)).logits[:, :-1].float()
            targets = part[:, 1:].to(logits.device)
            found.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1).cpu())
    return torch.cat(found).double().numpy()


def _rows(tokenizer: Any, n: int, length: int, kind: Kind, split: str, seed: int) -> LongTensor:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if n < 1 or length < 2:
        raise ValueError(f"n must be >= 1 and length >= 2, got {n} and {length}")
    pieces: Iterator[str]
    if kind == "stories":
        rng = Rng("quantization", split, seed)
        pieces = iter(lambda: BY_NAME["story"].document(rng, split), None)
    else:
        half = topics("calibration" if split == "train" else "test").documents
        pieces = (half[(seed + i) % len(half)] for i in count())
    ids: list[int] = []
    while len(ids) < n * (length - 1):
        ids += tokenizer(next(pieces), add_special_tokens=False, verbose=False).input_ids
    body = torch.tensor(ids[: n * (length - 1)]).view(n, length - 1)
    return torch.cat((torch.full((n, 1), tokenizer.bos_token_id), body), 1)
