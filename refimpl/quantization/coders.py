"""Two lossless coders of small integers, canonical Huffman and rANS, in numpy.

Canonical Huffman stores a length for each of the 2^b symbols and whole bits for each code: H <= bits <= H +
1. Range asymmetric numeral systems (rANS, arXiv 1311.2540) store 2^b frequencies and come within 0.02 bits of
H where there are enough codes. Both write all that their decoder needs. Codes go to *lanes* of about 4096,
coded side by side, so that numpy does one step of all lanes at once; a lane costs 32 bits.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["count_codes", "huffman_decode", "huffman_encode", "huffman_lengths", "rans_decode", "rans_encode"]

LANE = 4096  # codes
LONGEST = 32  # bits of a Huffman word, an upper limit
SCALE = 14  # rANS counts frequencies in units of 2^-14


def huffman_lengths(counts: np.ndarray) -> np.ndarray:
    """The length of each symbol's word in a Huffman code, uint8; 0 for a symbol that does not occur.

    Parameters: `counts`, integers >= 0, one or more of them > 0. Where a word would be longer than 32 bits,
    counts are halved (rounded up) until none is.

    >>> huffman_lengths(np.array([5, 2, 0, 1])).tolist()
    [1, 2, 0, 2]
    """
    lengths = np.zeros(len(counts), np.uint8)
    heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, first, some), (b, _, others) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[some + others] += 1
        heapq.heappush(heap, (a + b, first, some + others))
    return lengths if lengths.max() <= LONGEST else huffman_lengths((counts + 1) // 2)


def huffman_encode(codes: Tensor, bits: int) -> bytes:
    """Codes as words of a canonical Huffman code.

    Parameters: `codes`, uint8, any shape, below 2^b; `bits` b, 1 to 8. Returns 2^b lengths (bytes), the first
    bit of every lane (uint32), the words. Raises TypeError for another dtype, ValueError for no codes, codes
    or a b out of range, and words of 2^32 bits or more.

    >>> coded = huffman_encode(torch.tensor([0, 0, 1, 0, 3, 0, 0, 1], dtype=torch.uint8), 2)
    >>> list(coded[:4]), f"{coded[8]:08b}{coded[9]:08b}"                       # 0: 0, 1: 10, 3: 11
    ([1, 2, 0, 2], '0010011001000000')
    """
    lengths = huffman_lengths(count_codes(codes, bits))
    symbols = _symbols(codes)
    words = np.zeros(len(lengths), np.uint32)
    order, words_in_order = _canonical(lengths)
    words[order] = words_in_order
    size = lengths[symbols]
    starts = size.cumsum(dtype=np.int64) - size
    total = int(starts[-1]) + int(size[-1])
    if total >= 1 << 32:
        raise ValueError(f"codes need {total} bits; allowed: fewer than 2^32. Code them in parts")
    stream = np.zeros(total, np.uint8)
    for bit in range(int(lengths.max())):
        here = size > bit
        stream[starts[here] + bit] = words[symbols[here]] >> (LONGEST - 1 - bit) & 1
    return lengths.tobytes() + starts[::LANE].astype("<u4").tobytes() + np.packbits(stream).tobytes()


def huffman_decode(data: bytes, bits: int, numel: int) -> Tensor:
    """The codes, uint8 [numel], that `huffman_encode` wrote with b = `bits`.

    Raises ValueError for data that is too short.

    >>> codes = torch.tensor([0, 0, 1, 0, 3, 0, 0, 1], dtype=torch.uint8)
    >>> huffman_decode(huffman_encode(codes, 2), 2, 8).tolist()
    [0, 0, 1, 0, 3, 0, 0, 1]
    """
    lanes, symbols = -(-numel // LANE), 1 << bits
    _check_length(data, symbols + 4 * lanes + 1)
    lengths = np.frombuffer(data, np.uint8, symbols)
    order, words = _canonical(lengths)
    at = np.frombuffer(data, "<u4", lanes, symbols).astype(np.int64)
    stream = np.frombuffer(data + bytes(4), np.uint8)[symbols + 4 * lanes :].astype(np.uint64)
    end = 8 * (len(stream) - 4)
    # The 40 bits from every byte on: they hold the 32 bits from any bit of that byte on.
    windows = sum(stream[i : len(stream) - 4 + i] << np.uint64(32 - 8 * i) for i in range(5))
    out = np.zeros((lanes, min(LANE, numel)), np.uint8)
    for step in range(out.shape[1]):
        # The last lane may be shorter: what it reads past its end is thrown away.
        here = np.minimum(at, end - 1)
        window = windows[here >> 3] >> (8 - (here & 7)).astype(np.uint64) & np.uint64((1 << 32) - 1)
        out[:, step] = order[np.searchsorted(words, window, side="right") - 1]
        at += lengths[out[:, step]]
        if step == (numel - 1) % LANE and at[-1] > end:
            raise ValueError(f"data is too short for {numel} codes")
    return torch.from_numpy(out.ravel()[:numel].copy())


def rans_encode(codes: Tensor, bits: int) -> bytes:
    """Codes by rANS: states of 32 bits, one for each lane, and a stream of 16-bit words that all share.

    A symbol of frequency f, in steps of 2^-14, and of cumulated frequency c turns a state x into
    2^14 (x div f) + x mod f + c: x grows by log2(2^14 / f) bits.

    Parameters and errors: as for `huffman_encode`. Returns 2^b frequencies (uint16), the states (uint32), the
    words in the order of decoding.

    >>> codes = torch.zeros(4096, dtype=torch.uint8)
    >>> codes[::64] = 1
    >>> len(rans_encode(codes, 1)), len(huffman_encode(codes, 1))         # H = 0.116 bits: 60 bytes
    (66, 518)
    """
    f = _frequencies(count_codes(codes, bits))
    symbols, cumulated = _symbols(codes), f.cumsum() - f
    lanes = -(-len(symbols) // LANE)
    states, words = np.full(lanes, 1 << 16, np.uint64), []
    # The decoder takes lanes in turn from the first code on; the encoder goes the opposite way.
    for row in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        s = symbols[row : row + lanes]
        x = states[: len(s)]
        full = x >= f[s] << np.uint64(32 - SCALE)
        words.append(x[full].astype("<u2").tobytes())
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(s)] = (x // f[s] << np.uint64(SCALE)) + x % f[s] + cumulated[s]
    return f.astype("<u2").tobytes() + states.astype("<u4").tobytes() + b"".join(reversed(words))


def rans_decode(data: bytes, bits: int, numel: int) -> Tensor:
    """The codes, uint8 [numel], that `rans_encode` wrote with b = `bits`.

    Raises ValueError for data of another length.

    >>> codes = torch.arange(5000).remainder(7).to(torch.uint8)
    >>> torch.equal(rans_decode(rans_encode(codes, 3), 3, 5000), codes)
    True
    """
    lanes, symbols = -(-numel // LANE), 1 << bits
    _check_length(data, 2 * symbols + 4 * lanes)
    f = np.frombuffer(data, "<u2", symbols).astype(np.uint64)
    cumulated, table = f.cumsum() - f, np.repeat(np.arange(symbols), f.astype(np.int64))
    states = np.frombuffer(data, "<u4", lanes, 2 * symbols).astype(np.uint64)
    words = np.frombuffer(data, "<u2", offset=2 * symbols + 4 * lanes).astype(np.uint64)
    out, at = np.zeros(numel, np.uint8), 0
    for row in range(0, numel, lanes):
        x = states[: numel - row]
        slot = x & np.uint64((1 << SCALE) - 1)
        s = out[row : row + lanes] = table[slot]
        x = f[s] * (x >> np.uint64(SCALE)) + slot - cumulated[s]
        low = np.flatnonzero(x < 1 << 16)
        _check_length(words, at + len(low))
        x[low] = x[low] << np.uint64(16) | words[at : at + len(low)]
        at += len(low)
        states[: len(x)] = x
    if at < len(words):
        raise ValueError(f"data is too long for {numel} codes: {2 * (len(words) - at)} bytes are left")
    return torch.from_numpy(out)


def count_codes(codes: Tensor, bits: int) -> np.ndarray:
    """How often each of the 2^b symbols occurs, [2^b]; raises as `huffman_encode`.

    >>> count_codes(torch.tensor([0, 3, 3], dtype=torch.uint8), 2).tolist()
    [1, 0, 0, 2]
    """
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    counts = np.bincount(_symbols(codes), minlength=1 << bits)
    if not codes.numel() or len(counts) > 1 << bits:
        got = f"a code {len(counts) - 1}" if codes.numel() else "none"
        raise ValueError(f"codes must be one or more numbers from 0 to {(1 << bits) - 1}, got {got}")
    return counts


def _symbols(codes: Tensor) -> np.ndarray:
    return codes.flatten().cpu().numpy()


def _canonical(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols by length, then by number; and their words, which rise, filled up with zeros to 32 bits."""
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    widths = np.uint64(1) << (LONGEST - lengths[order].astype(np.int64)).astype(np.uint64)
    return order, widths.cumsum() - widths


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts as whole numbers with the sum 2^14, at least 1 for what occurs; uint64."""
    present = counts > 0
    free = (1 << SCALE) - int(present.sum())
    f = present + counts * free // counts.sum()
    f[counts.argmax()] += (1 << SCALE) - f.sum()
    return f.astype(np.uint64)


def _check_length(data: Sequence[int], least: int) -> None:
    if len(data) < least:
        raise ValueError(f"data is too short: {len(data)}, needed {least}")
