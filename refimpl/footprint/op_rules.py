"""What each op saves for its backward pass, as rules on tensors that have sizes and no values.

    matmul, linear        both factors, where the other needs a gradient; a weight is a parameter and free
    x * y                 x if y needs a gradient, y if x does
    softmax, tanh, rsqrt  the output
    pow, silu, gelu       the input
    layer_norm            the input, and mean and 1/deviation of every token
    sdpa                  q, k, v, the output, and one float32 log-sum per head and token
    cross_entropy         the log-probabilities, the labels and their number
    +, scaling, reshape   nothing

A tensor is saved once however many ops read it, and a view keeps its whole storage alive. The rules describe
the CPU kernels of torch 2.13.
"""

from __future__ import annotations

from refimpl.footprint.arch import DTYPE_BYTES, Run
from refimpl.footprint.saved_tensors import SavedTensor

__all__ = ["SizeTensor", "Storage", "Tape"]

ITEMSIZE = DTYPE_BYTES | {"int64": 8}


class Storage:
    """So many bytes, which views share and which are saved once."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.saved = nbytes, False


class SizeTensor:
    """A tensor without values.

    Parameters
    ----------
    numel, dtype : its distinct elements and their type.
    storage : that of another tensor, if it is a view.
    repeats : how often an expanded view shows each element; a copy has so many times the elements.

    >>> kv = SizeTensor(64, "float32")
    >>> SizeTensor(64, "float32", storage=kv.storage, repeats=4).to("bfloat16").numel
    256
    """

    def __init__(self, numel: int, dtype: str, *, storage: Storage | None = None, repeats: int = 1) -> None:
        self.numel, self.dtype, self.repeats, self.saved = numel, dtype, repeats, False
        self.storage = storage or Storage(numel * ITEMSIZE[dtype])

    def to(self, dtype: str) -> SizeTensor:
        """Return this tensor, or its copy in another dtype."""
        return self if dtype == self.dtype else SizeTensor(self.numel * self.repeats, dtype)

    def copy(self) -> SizeTensor:
        return SizeTensor(self.numel * self.repeats, self.dtype)


class Tape:
    """The ops of a forward pass: each notes what it saves, under its module's name, and returns its output.

    Parameters
    ----------
    run : batch, length, dtype and amp are read. Under autocast ("amp") the residual stream and the norms are
        float32, matmuls and attention bfloat16: every matmul casts its inputs anew, and its weight, and keeps
        these casts.

    >>> tape = Tape(Run(batch=1, length=8))
    >>> hidden = tape.silu("act", tape.linear("up", tape.stream(4), 4, 16))
    >>> [(line.module, line.op, line.tensor, line.numel) for line in tape.lines]
    [('up', 'linear', 'input', 32), ('act', 'silu', 'input', 128)]
    """

    def __init__(self, run: Run) -> None:
        self.run, self.n = run, run.tokens
        self.half = "bfloat16" if run.amp else run.dtype
        self.lines: list[SavedTensor] = []

    def save(self, module: str, op: str, **tensors: SizeTensor) -> None:
        for role, x in tensors.items():
            if not x.saved:
                resident = 0 if x.storage.saved else x.storage.nbytes
                x.saved = x.storage.saved = True
                payload = x.numel * ITEMSIZE[x.dtype]
                role = role.replace("_", " ")
                self.lines.append(SavedTensor(module, op, role, x.dtype, x.numel, payload, resident))

    def stream(self, width: int) -> SizeTensor:
        """Return a fresh state of the residual stream: the sum of the last one and a block's output."""
        return SizeTensor(self.n * width, self.run.dtype)

    def linear(
        self, module: str, x: SizeTensor, width: int, out: int, *, bias: bool = False, op: str = "linear"
    ) -> SizeTensor:
        kept = {"input": x.to(self.half)}
        if self.run.amp:
            cast = {"weight_cast": SizeTensor(width * out, "bfloat16")}
            # With a bias the op is an addmm, which saves its input first.
            kept = kept | cast if bias else cast | kept
        self.save(module, op, **kept)
        return SizeTensor(self.n * out, self.half)

    def layer_norm(self, module: str, x: SizeTensor) -> SizeTensor:
        mean, deviation = SizeTensor(self.n, x.dtype), SizeTensor(self.n, x.dtype)
        self.save(module, "layer_norm", input=x, mean=mean, deviation=deviation)
        return SizeTensor(x.numel, x.dtype)

    def rms_norm(self, module: str, x: SizeTensor) -> SizeTensor:
        """LLaMA's RMSNorm, of single ops in float32; the gain multiplies in the dtype of x."""
        x32, rsqrt = x.to("float32"), SizeTensor(self.n, "float32")
        self.save(module, "pow", input=x32)
        self.save(module, "rsqrt", output=rsqrt)
        self.save(module, "mul", factor=rsqrt, input=x32)
        self.save(module, "mul", normed=SizeTensor(x.numel, x.dtype))
        return SizeTensor(x.numel, x.dtype)

    def rope(self, module: str, x: SizeTensor, cos: SizeTensor, sin: SizeTensor) -> SizeTensor:
        """x·cos + rotated(x)·sin: cos and sin need no gradient, so x is not saved."""
        self.save(module, "mul", cos=cos, sin=sin)
        return SizeTensor(x.numel, cos.dtype)

    def repeat(self, x: SizeTensor, kv_heads: int, times: int) -> SizeTensor:
        """Give each KV head to `times` query heads; a single KV head is expanded without a copy."""
        if times == 1:
            return x
        view = SizeTensor(x.numel, x.dtype, storage=x.storage, repeats=times)
        return view if kv_heads == 1 else view.copy()

    def sdpa(self, module: str, q: SizeTensor, k: SizeTensor, v: SizeTensor, heads: int) -> SizeTensor:
        q, k, v = (x.to(self.half) for x in (q, k, v))
        log_sum, out = SizeTensor(self.n * heads, "float32"), SizeTensor(q.numel, self.half)
        self.save(module, "scaled_dot_product_attention", k=k, q=q, v=v, log_sum=log_sum, output=out)
        return out

    def eager(
        self, module: str, q: SizeTensor, k: SizeTensor, v: SizeTensor, heads: int, *,
        upcast: bool = False, divided: bool = False,
    ) -> SizeTensor:  # fmt: skip
        """softmax(q·k) v by single ops; scaling by a number and adding the mask save nothing.

        `upcast`: the softmax runs in float32 (under autocast it always does). `divided`: the scores are
        divided by a tensor of one element.
        """
        q, k, v = (self._folded(x.to(self.half), heads) for x in (q, k, v))
        self.save(module, "matmul", k=k, q=q)
        if divided:
            self.save(module, "div", scale=SizeTensor(1, self.half))
        dtype = "float32" if upcast or self.run.amp else self.half
        softmax = SizeTensor(self.n * self.run.length * heads, dtype)
        self.save(module, "softmax", output=softmax)
        self.save(module, "matmul", v=v, weights=softmax.to(self.half))
        return SizeTensor(q.numel, self.half)  # heads side by side again: a copy of the product

    def _folded(self, x: SizeTensor, heads: int) -> SizeTensor:
        """[B, heads, S, D] as [B·heads, S, D] for torch.bmm: a copy, unless one of the two is 1."""
        return x if 1 in (self.run.batch, heads) else x.copy()

    def silu(self, module: str, x: SizeTensor) -> SizeTensor:
        self.save(module, "silu", input=x)
        return SizeTensor(x.numel, x.dtype)

    def gelu(self, module: str, x: SizeTensor) -> SizeTensor:
        self.save(module, "gelu", input=x)
        return SizeTensor(x.numel, x.dtype)

    def gelu_new(self, module: str, x: SizeTensor) -> SizeTensor:
        """x/2 · (1 + tanh(c·(x + 0.044715·x³))) by single ops: four tensors instead of one."""
        self.save(module, "pow", input=x)
        self.save(module, "tanh", output=SizeTensor(x.numel, x.dtype))
        return self.mul(module, SizeTensor(x.numel, x.dtype), SizeTensor(x.numel, x.dtype))

    def mul(self, module: str, x: SizeTensor, y: SizeTensor) -> SizeTensor:
        self.save(module, "mul", factor=y, other=x)
        return SizeTensor(x.numel, x.dtype)

    def cross_entropy(self, logits: SizeTensor) -> None:
        """The loss, in float32. For B = 1 the shifted labels are a view of the padded ones, else a copy."""
        padded = Storage(8 * (self.n + (1 if self.run.batch == 1 else 0)))
        self.save(
            "(model)",
            "cross_entropy",
            log_probabilities=SizeTensor(logits.numel, "float32"),
            labels=SizeTensor(self.n, "int64", storage=padded),
            labels_counted=SizeTensor(1, "float32"),
        )
