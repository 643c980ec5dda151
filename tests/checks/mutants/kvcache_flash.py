"""Plausible but wrong tiled attentions that their checks must reject."""

import torch

from refimpl.kvcache.flash import flash_attention, flash_scores, naive_attention


def tile_by_tile(q, k, v, *, scale=None, causal=True, tile=(128, 128), rescale=True, running=True):
    """The online softmax with parts of it switched off."""
    good, _ = flash_attention(q, k, v, scale=scale, causal=causal, tile=tile)
    H, G, T, S = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        s = s.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)
    m = torch.full(s.shape[:3], -torch.inf, dtype=s.dtype)
    l, o = torch.zeros_like(m), torch.zeros_like(good)
    for start in range(0, S, tile[1]):
        part = s[..., start : start + tile[1]]
        new = torch.maximum(m, part.amax(-1)) if running else torch.zeros_like(m)
        old = torch.exp(m - new).nan_to_num() if rescale else torch.ones_like(m)
        weights = torch.exp(part - new[..., None])
        l = l * old + weights.sum(-1)
        o = o * (old if rescale else 1 + 0 * old)[..., None] + weights @ v[:, :, start : start + tile[1]]
        m = new
    return o / l[..., None], m + l.log()


def old_sums_not_rescaled(q, k, v, **options):
    return tile_by_tile(q, k, v, rescale=False, **options)


def whole_matrix(q, k, v, *, tile=(128, 128), scale=None, causal=True):
    flash_attention(q, k, v, tile=tile, scale=scale, causal=causal)
    out, _ = naive_attention(q, k, v, scale=scale, causal=causal)
    return out, flash_attention(q, k, v, scale=scale, causal=causal)[1]


def top_left_causal(q, k, v, *, causal=True, **options):
    if causal:
        flash_attention(q, k, v, **options)
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    return flash_attention(q, k, v, causal=causal, **options)


def heads_interleaved(q, k, v, **options):
    H, G = q.shape[1], k.shape[1]
    order = torch.arange(H).view(-1, G).T.flatten()
    out, lse = flash_attention(q[:, order], k, v, **options)
    return out[:, order.argsort()], lse[:, order.argsort()]


def scale_ignored(q, k, v, *, scale=None, **options):
    return flash_attention(q, k, v, **options)


def sums_of_the_first_pass(q, k, v, *, tile=(128, 128), **options):
    """Adds up weights normalised with the running sum instead of the final one."""
    out, sums = flash_scores(q, k, v, tile=tile, **options)
    T, S = q.shape[2], k.shape[2]
    early = torch.zeros_like(sums)
    for start in range(0, S, tile[1]):
        stop = min(start + tile[1], S)
        seen = S - T if options.get("causal", True) else 0
        first = max(0, stop - T - seen) if options.get("causal", True) else 0
        part = naive_attention(q[:, :, first:], k[:, :, :stop], v[:, :, :stop], causal=False)[1]
        early[..., start:stop] = part[..., start:stop]
    return out, early


def uniform_sums(q, k, v, **options):
    out, sums = flash_scores(q, k, v, **options)
    return out, sums.mean(-1, keepdim=True).expand_as(sums)


def sums_from_the_matrix(q, k, v, *, tile=(128, 128), **options):
    flash_scores(q, k, v, tile=tile, **options)
    return naive_attention(q, k, v, **options)


MUTANTS = [
    ("flash_attention", "earlier tiles are not rescaled to the new maximum", old_sums_not_rescaled),
    ("flash_attention", "the whole matrix of weights is made", whole_matrix),
    ("flash_attention", "causality counted from the first key", top_left_causal),
    ("flash_attention", "query heads are dealt out to KV heads in turn", heads_interleaved),
    ("flash_attention", "the scale is ignored", scale_ignored),
    ("flash_scores", "weights normalised before the row is complete", sums_of_the_first_pass),
    ("flash_scores", "every key gets the mean", uniform_sums),
    ("flash_scores", "the whole matrix of weights is made", sums_from_the_matrix),
]
