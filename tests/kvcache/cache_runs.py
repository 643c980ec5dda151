"""What the tests of caches share: feed ids in pieces, compare, and the two ways to feed a prompt."""

import torch

from refimpl.checks.tiny import random_ids
from refimpl.kvcache import KVCache

LONG = {"max_position_embeddings": 512}  # of tiny("llama"); GPT-2 calls it n_positions


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


@torch.no_grad()
def run(model, cache, ids, sizes, mask=None, positions=None):
    """Logits of feeding ids in pieces of the given sizes."""
    out, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        out.append(model(
            ids[:, part], past_key_values=cache, use_cache=True,
            attention_mask=None if mask is None else mask[:, : part.stop],
            position_ids=None if positions is None else positions[:, part],
        ).logits)  # fmt: skip
        start = part.stop
    return torch.cat(out, 1)


def close(a, b, atol=1e-5):
    assert (a - b).abs().max().item() <= atol, f"largest difference {(a - b).abs().max().item():.2e}"


def padded(lengths, new, longest):
    """Rows of different lengths, `new` tokens more: rows, left-padded batch, mask, positions."""
    rows = [random_ids(1, n + new, seed=n) for n in lengths]
    batch = torch.ones(len(rows), longest + new, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        batch[b, longest - n :], mask[b, longest - n :] = row[0], 1
    return rows, batch, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def check_padding_and_chunks(model, make, lengths=(30, 24, 7), new=8):
    """A padded batch equals each row alone, a chunked prompt the whole one."""
    longest = max(lengths)
    rows, batch, mask, positions = padded(lengths, new, longest)
    cache = KVCache(model, make())
    out = run(model, cache, batch, [longest] + [1] * new, mask, positions)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        alone = KVCache(model, make())
        close(out[b, longest - n :], run(model, alone, row, [n] + [1] * new)[0], 2e-5)
        for l in range(3):
            assert torch.equal(cache.held(l)[b], alone.held(l)[0])
    whole, chunked = KVCache(model, make()), KVCache(model, make())
    expected = run(model, whole, rows[0], [longest] + [1] * new)
    with chunked.prefill():
        parts = [run(model, chunked, rows[0][:, a:b], [b - a]) for a, b in ((0, 13), (13, 14), (14, longest))]
    parts.append(run(model, chunked, rows[0][:, longest:], [1] * new))
    close(torch.cat(parts, 1), expected, 2e-5)
    for a, b in zip(whole.layers, chunked.layers, strict=True):
        assert torch.equal(a.pos, b.pos)
