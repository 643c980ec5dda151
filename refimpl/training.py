"""One training loop for pretraining, fine-tuning, adapters and distillation: on a CPU, a GPU, or several.

A step is a number, and everything about it follows from that number: its batch (`batches(step)`), its
learning rate (`learning_rate`) and the seed of its dropout. So a run that was killed and resumed repeats the
curve of one that was not.

Parallel runs: start the same script with `torchrun --nproc_per_node=N`, put the model on `process_device()`.
Every process sees the same `batches(step)` and trains on its own slice of the rows.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.muon import Muon
from refimpl.paths import atomic_write

IGNORE = -100  # the label that means "no target here", as in torch's cross_entropy

Batch = Any  # a tensor [rows, T], or a dict of tensors whose first dimension is rows


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are the recipe that our models were pretrained with.

    Parameters: `steps`, optimizer updates; `batch`, rows per update over all processes; `lr`, the peak
    learning rate; `warmup`, steps of linear rise; `decay_fraction`, the last part of the run, in which the
    rate falls linearly to 0; `weight_decay`, on parameters with two or more dimensions (not on norms and
    biases); `betas` of AdamW; `optimizer`, "adamw", or "muon": Muon for the matrices of the layers and AdamW
    for embeddings, output head, norms and biases; `clip`, the largest gradient norm; `amp`, bfloat16 autocast
    on a GPU (a CPU always computes in the model's dtype); `compile`, torch.compile of model and loss; `micro_batch`, rows per
    forward pass of one process (None: all); `save_every_steps`, `save_every_seconds`, when checkpoints are
    written besides the last one; `log_every`, steps between records; `eval_steps`, numbers of finished
    updates after which `on_step` is called; `seed`, of dropout; `data`, a name or hash of the data: a resume
    with another one is refused.
    Raises `ValueError` for values out of range.

    >>> TrainConfig(steps=1000, batch=96, lr=3e-3).warmup
    200
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    decay_fraction: float = 0.4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    optimizer: str = "adamw"
    clip: float = 1.0
    amp: bool = True
    compile: bool = False
    micro_batch: int | None = None
    save_every_steps: int | None = None
    save_every_seconds: float | None = None
    log_every: int = 10
    eval_steps: tuple[int, ...] = ()
    seed: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "eval_steps", tuple(sorted(set(self.eval_steps))))
        rules = {
            "steps": (self.steps >= 1, "an integer >= 1"),
            "batch": (self.batch >= 1, "an integer >= 1"),
            "lr": (self.lr > 0, "a number > 0"),
            "warmup": (self.warmup >= 0, "an integer >= 0"),
            "decay_fraction": (0 <= self.decay_fraction <= 1, "a number in [0, 1]"),
            "weight_decay": (self.weight_decay >= 0, "a number >= 0"),
            "betas": (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"),
            "optimizer": (self.optimizer in ("adamw", "muon"), "'adamw' or 'muon'"),
            "clip": (self.clip > 0, "a number > 0 (math.inf: no clipping)"),
            "micro_batch": (self.micro_batch is None or self.micro_batch >= 1, "None or an integer >= 1"),
            "save_every_steps": (
                self.save_every_steps is None or self.save_every_steps >= 1, "None or an integer >= 1"
            ),
            "save_every_seconds": (
                self.save_every_seconds is None or self.save_every_seconds > 0, "None or a number > 0"
            ),
            "log_every": (self.log_every >= 1, "an integer >= 1"),
            "eval_steps": (all(0 <= s <= self.steps for s in self.eval_steps), f"in 0..{self.steps} (steps)"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
        if self.warmup + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup ({self.warmup} steps) and decay ({self.decay_steps} steps, decay_fraction="
                f"{self.decay_fraction}) do not fit into steps={self.steps}; lower warmup or decay_fraction"
            )

    @property
    def decay_steps(self) -> int:
        """Steps over which the learning rate falls to 0 at the end of the run."""
        return round(self.decay_fraction * self.steps)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` finished updates.

        >>> config = TrainConfig(steps=10, batch=1, lr=1.0, warmup=2, decay_fraction=0.4)
        >>> [config.learning_rate(step) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if step > self.steps - self.decay_steps:
            return self.lr * (self.steps - step) / self.decay_steps
        return self.lr


# Fields that a resumed run may change: when files are written, and how the same sums are computed.
_FREE_ON_RESUME = ("save_every_steps", "save_every_seconds", "micro_batch", "compile")


@dataclass
class History:
    """What a run recorded.

    `records`: per logged step `{step, tokens, loss, lr, seconds, grad_norm}`; `step` counts finished
    updates, `loss` and `grad_norm` (before clipping) are those of the last of them, `tokens` and `seconds`
    are totals (seconds of training: without evaluations and checkpoints). `evaluations`: what `on_step`
    returned, with its step. `run`: configuration, parameter count, hardware, versions. `step`: updates
    finished so far.
    """

    run: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def losses(self) -> list[float]:
        """The loss of every logged step."""
        return [record["loss"] for record in self.records]

    @property
    def finished(self) -> bool:
        """Whether the run took all its steps (else it stopped at its time limit)."""
        return self.step == self.run["config"]["steps"]

    def to_json(self) -> str:
        """Return the history as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "History":
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


class Rows:
    """Batches of token rows in seeded random order: a map from step to batch, every row once per epoch.

    Parameters: `tokens`, an integer array [N, T], which may be a memory map; `batch`, rows per step; `seed`
    of the order; `shuffle=False` takes the rows as they come (for data whose schedule is already laid out).
    Raises `ValueError` when there are fewer rows than one batch needs.

    >>> rows = Rows(np.arange(12, dtype=np.uint16).reshape(6, 2), batch=2, shuffle=False)
    >>> rows(1).tolist(), rows(3).tolist()
    ([[4, 5], [6, 7]], [[0, 1], [2, 3]])
    """

    def __init__(self, tokens: np.ndarray, batch: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            shape = list(tokens.shape)
            raise ValueError(f"tokens must be an integer array [N, T], got {tokens.dtype} {shape}")
        if not 1 <= batch <= len(tokens):
            raise ValueError(f"batch must be in 1..{len(tokens)} (the number of rows), got {batch}")
        self.tokens, self.batch, self.seed, self.shuffle = tokens, batch, seed, shuffle
        self._epoch, self._order = -1, np.arange(len(tokens))

    def __call__(self, step: int) -> Tensor:
        """Return the batch of a step, LongTensor [batch, T]."""
        # Positions run on over the epochs' ends, so that no row is dropped; a batch may straddle two epochs.
        rows = [self._row(step * self.batch + i) for i in range(self.batch)]
        return torch.from_numpy(self.tokens[rows].astype(np.int64))

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self.tokens))
        if not self.shuffle:
            return index
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.tokens))
        return int(self._order[index])


def targets(batch: Batch, pad_id: int | None) -> Tensor | None:
    """Return the token that each position has to predict, [rows, T], with -100 where there is none.

    A dict's `labels` [rows, T] (-100: no target) are the tokens to learn, each predicted by the position
    before it; without them every token of the row is a target except padding (`pad_id`, or 0 in
    `attention_mask`). None for a dict with neither `labels` nor `input_ids`: only a loss of its own
    knows what to do with it.

    >>> targets(torch.tensor([[0, 7, 8, 1]]), pad_id=1).tolist()
    [[7, 8, -100, -100]]
    """
    if isinstance(batch, Mapping):
        if "labels" in batch:
            labels = batch["labels"]
        elif "input_ids" in batch:
            labels = batch["input_ids"]
            if "attention_mask" in batch:
                labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
        else:
            return None
    else:
        labels = batch
    if pad_id is not None:
        labels = labels.masked_fill(labels == pad_id, IGNORE)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean next-token cross-entropy in nats, computed in float32.

    Parameters: `model`, a causal language model of transformers; `batch`, LongTensor [B, T] or a dict with
    `input_ids` and perhaps `labels` and `attention_mask` (see `targets`). 0 when no token is a target.
    """
    if isinstance(batch, Mapping):
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False
        ).logits
    else:
        logits = model(input_ids=batch, use_cache=False).logits
    labels = targets(batch, _pad_id(model)).flatten()
    # The labels are shifted, not the logits: a slice of [B, T, V] would be copied.
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def process_device() -> torch.device:
    """Return this process's device: its own GPU under torchrun, else the first, else the CPU.

    >>> process_device().type in ("cpu", "cuda")
    True
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def train(
    model: nn.Module,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    *,
    loss_fn: Callable[[nn.Module, Batch], Tensor] = lm_loss,
    out_dir: str | Path | None = None,
    on_step: Callable[[int, nn.Module], dict[str, Any] | None] | None = None,
    time_limit: float = math.inf,
    progress: bool = True,
) -> History:
    """Train a model in place and return what was recorded.

    Parameters: `model`, on its device, with `requires_grad` off for what stays frozen; `batches`, from
    step (0, 1, …) to LongTensor [config.batch, T] or a dict of tensors with that many rows, always the same
    for the same step (it is called in a thread of its own); `loss_fn(model, batch)`, the mean loss over the
    batch's target tokens (over its rows where `targets` returns None); `out_dir`, for
    `checkpoint.safetensors` and `log.json`: a checkpoint found there is continued; `on_step(step, model)`,
    called in evaluation mode without gradients after each of `config.eval_steps` (by process 0), may return a
    dict for the history; `time_limit`, seconds after which the run saves and stops (at its next record);
    `progress`, a bar for runs over five seconds (never when the variable CI is set). Leaves the model in
    evaluation mode. Rows must be padded on the right where a batch has no `attention_mask`.
    Raises `ValueError` for a batch of the wrong size or a checkpoint of another configuration,
    `FloatingPointError` when the loss is no longer finite.

    >>> from torch import nn
    >>> line = nn.Linear(1, 1)
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> config = TrainConfig(steps=200, batch=8, lr=0.1, warmup=1, weight_decay=0.0)
    >>> error = lambda model, batch: ((model(batch["x"]) - 3 * batch["x"]) ** 2).mean()
    >>> train(line, lambda step: {"x": x}, config, loss_fn=error).losses[-1] < 1e-3
    True
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    with (
        _processes(device) as (rank, world),
        _CausalAttention(model) as attention,
        _own_random_state(device),
    ):
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("model has no parameter with requires_grad=True")
        if config.batch % world:
            raise ValueError(f"batch ({config.batch}) must be a multiple of the {world} processes")
        optimizers = _optimizers(model, config, device)
        history = History(run=_describe(model, config, device, world))
        checkpoint = Path(out_dir) / "checkpoint.safetensors" if out_dir is not None else None
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            if checkpoint.exists():
                history = _resume(checkpoint, model, optimizers, history.run)

        objective: nn.Module = _Objective(model, loss_fn)
        if world > 1:
            objective = nn.parallel.DistributedDataParallel(
                objective, device_ids=[device] if device.type == "cuda" else None
            )
        # no_sync() belongs to the DDP module, not to its compiled wrapper.
        no_sync = objective.no_sync if world > 1 else contextlib.nullcontext
        forward = torch.compile(objective, dynamic=False) if config.compile else objective
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.amp and device.type == "cuda")

        loader = _Loader(batches, config, rank, world, _pad_id(model), device)
        bar = _progress_bar(config.steps, history.step, enabled=progress and rank == 0)
        clock = _Clock(device, history.seconds)
        last_save = time.perf_counter()

        def evaluate() -> None:
            already = any(entry["step"] == history.step for entry in history.evaluations)
            if on_step is None or history.step not in config.eval_steps or already or rank != 0:
                return
            with clock.paused(), attention.ordinary(), torch.no_grad():
                model.eval()
                found = on_step(history.step, model)
                model.train()
            history.evaluations.append({"step": history.step, **(found or {})})

        def save() -> None:
            if checkpoint is not None and rank == 0:
                with clock.paused():
                    history.seconds = clock.seconds()
                    _save(checkpoint, model, optimizers, history)

        model.train()
        evaluate()
        stop = history.step >= config.steps
        with loader, bar:
            while not stop:
                step = history.step
                _seed_dropout(config.seed, step, rank)
                lr = config.learning_rate(step)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                pieces, tokens = loader.get(step)
                loss = torch.zeros((), device=device)
                for i, (piece, weight) in enumerate(pieces):
                    # The gradients of all processes are averaged once, after the last piece.
                    last_piece = i + 1 == len(pieces)
                    with contextlib.nullcontext() if last_piece else no_sync():
                        with autocast:
                            part = forward(piece) * weight
                        part.backward()
                    loss += part.detach()
                grad_norm = nn.utils.clip_grad_norm_(parameters, config.clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                history.step += 1
                history.tokens += tokens

                last = history.step == config.steps
                if history.step % config.log_every == 0 or last or step == 0:
                    # Reading the loss makes the loop wait for the device: never do it at every step.
                    out_of_time = time.perf_counter() - started > time_limit
                    mean, norm, stop = _shared(loss, grad_norm, out_of_time, world)
                    _require_finite(mean, norm, history.step, lr)
                    history.seconds = clock.seconds()
                    history.records.append({
                        "step": history.step, "tokens": history.tokens, "loss": mean, "lr": lr,
                        "seconds": round(history.seconds, 3), "grad_norm": norm,
                    })
                    speed = history.tokens / history.seconds
                    bar.set_postfix_str(f"loss {mean:.3f}, {speed:.0f} tokens/s", refresh=False)
                bar.update()
                stop = stop or last
                evaluate()
                due = config.save_every_steps and history.step % config.save_every_steps == 0
                if config.save_every_seconds and time.perf_counter() - last_save > config.save_every_seconds:
                    due = True
                if due or stop:
                    _require_finite(loss.item(), grad_norm.item(), history.step, lr)
                    save()
                    last_save = time.perf_counter()
        model.eval()
    return history


# --- one step -------------------------------------------------------------------------------------


class _Objective(nn.Module):
    """Model and loss as one module: what DDP wraps and torch.compile sees."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch)


def _optimizers(model: nn.Module, config: TrainConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the layers if `config.optimizer` says so."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [
        p for name, p in trained.items()
        if config.optimizer == "muon" and p.ndim == 2 and id(p) not in tables and "lm_head" not in name
    ]  # fmt: skip
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained.values() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    found: list[torch.optim.Optimizer] = []
    if groups:
        fused = device.type == "cuda"
        found.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused))
    if matrices:
        found.append(
            Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return found


def _state_of(optimizers: list[torch.optim.Optimizer], parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer of this parameter remembers of it."""
    return next(o.state[parameter] for o in optimizers if parameter in o.state)


def _pad_id(model: nn.Module) -> int | None:
    """The id that is only ever padding: a model whose padding is also its end of text has none."""
    model_config = getattr(model, "config", None)
    pad = getattr(model_config, "pad_token_id", None)
    return None if pad == getattr(model_config, "eos_token_id", None) else pad


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    # Dropout draws from torch's global state, which train() has put aside (_own_random_state).
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


@contextlib.contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _require_finite(loss: float, grad_norm: float, step: int, lr: float) -> None:
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"loss {loss} and gradient norm {grad_norm} at step {step} (learning rate {lr:.2e}); lower lr or "
            "clip; a checkpoint saved before is untouched"
        )


class _Loader:
    """Fetches the next batch in a thread, cuts out this process's rows and moves them to the device."""

    def __init__(
        self, batches: Callable[[int], Batch], config: TrainConfig, rank: int, world: int,
        pad_id: int | None, device: torch.device,
    ) -> None:
        self.batches, self.config, self.rank, self.world = batches, config, rank, world
        self.pad_id, self.device = pad_id, device
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.pending: tuple[int, Any] | None = None

    def get(self, step: int) -> tuple[list[tuple[Batch, Tensor]], int]:
        """Return the step's micro batches with the weight of each, and the tokens of the whole batch."""
        if self.pending is None or self.pending[0] != step:
            self.pending = (step, self.pool.submit(self._prepare, step))
        pieces, tokens = self.pending[1].result()
        if step + 1 < self.config.steps:
            self.pending = (step + 1, self.pool.submit(self._prepare, step + 1))
        return [(_map(piece, self._move), self._move(weight)) for piece, weight in pieces], tokens

    def __enter__(self) -> "_Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _move(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # else the copy would not run beside the GPU's work
        return tensor.to(self.device, non_blocking=True)

    def _prepare(self, step: int) -> tuple[list[tuple[Batch, Tensor]], int]:
        batch = _map(self.batches(step), torch.as_tensor)
        for name, tensor in batch.items() if isinstance(batch, Mapping) else [("batch", batch)]:
            if tensor.ndim == 0 or len(tensor) != self.config.batch:
                raise ValueError(
                    f"batches({step}): {name} has shape {list(tensor.shape)}, but config.batch="
                    f"{self.config.batch} rows"
                )
        # A mean over target tokens, whatever the split: each piece counts by its share of the targets.
        wanted = targets(batch, self.pad_id)
        count = torch.ones(self.config.batch) if wanted is None else (wanted != IGNORE).sum(1)
        # Of a batch that lies on a GPU already, no value is read here: that would wait for the GPU's queue.
        if count.device.type == "cpu" and count.sum() == 0:
            raise ValueError(f"batches({step}) has no target token")
        share = count / count.sum() * self.world  # DDP averages over processes
        rows = self.config.batch // self.world
        size = self.config.micro_batch or rows
        pieces = []
        for start in range(self.rank * rows, (self.rank + 1) * rows, size):
            cut = slice(start, min(start + size, (self.rank + 1) * rows))
            piece = _map(batch, lambda tensor, cut=cut: tensor[cut].contiguous())
            pieces.append((piece, share[cut].sum()))
        ids = batch.get("input_ids", next(iter(batch.values()))) if isinstance(batch, Mapping) else batch
        return pieces, ids.numel()


def _map(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    if isinstance(batch, Mapping):
        return {name: function(value) for name, value in batch.items()}
    return function(batch)


# --- attention without a mask ---------------------------------------------------------------------


@functools.cache
def _causal_implementation() -> str:
    """Register, once, an attention implementation that is sdpa without a mask wherever nothing is padded."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def no_mask_if_plain(*args: Any, **kwargs: Any) -> Tensor | None:
        # local_size: the window of a sliding-window layer, which is_causal cannot express.
        if kwargs.get("attention_mask") is None and kwargs.get("local_size") is None:
            return None
        return sdpa_mask(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("refimpl_causal", sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register("refimpl_causal", no_mask_if_plain)
    return "refimpl_causal"


class _CausalAttention:
    """While it is entered, a transformers model that attends with sdpa uses `is_causal=True`, not a mask.

    Left alone, transformers builds a mask of [B, 1, T, T] whenever torch.compile traces the model (it cannot
    look into `position_ids` to see that nothing is packed there), and sdpa then cannot use its flash kernels.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        self.config = config if getattr(config, "_attn_implementation", None) == "sdpa" else None

    def __enter__(self) -> "_CausalAttention":
        if self.config is not None:
            self.config._attn_implementation = _causal_implementation()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.config is not None:
            self.config._attn_implementation = "sdpa"

    @contextlib.contextmanager
    def ordinary(self) -> Iterator[None]:
        """The model as its owner knows it, for the time of an evaluation."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


# --- several processes ----------------------------------------------------------------------------


@contextlib.contextmanager
def _processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started; yield this one's number and how many there are."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    if torch.distributed.is_initialized():
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
        return
    # Process 0 evaluates while the others wait: an hour is longer than any evaluation.
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    finally:
        torch.distributed.destroy_process_group()


def _shared(loss: Tensor, grad_norm: Tensor, stop: bool, world: int) -> tuple[float, float, bool]:
    """Average the loss over processes; stop when one of them wants to."""
    values = torch.stack([loss.float(), grad_norm.float(), torch.tensor(float(stop), device=loss.device)])
    if world > 1:
        torch.distributed.all_reduce(values)
        values /= world
    mean, norm, wish = values.tolist()
    return mean, norm, wish > 0


# --- checkpoints ----------------------------------------------------------------------------------


def _trained_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _save(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], history: History
) -> None:
    """Write parameters, buffers, optimizer state and history as one file: they can never disagree."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in _trained_names(model).items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in _state_of(optimizers, parameter).items():
            tensors[f"optimizer.{key}.{name}"] = value
    for name, buffer in model.named_buffers():
        tensors[f"buffer.{name}"] = buffer
    # One copy each: safetensors refuses tensors that share storage.
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    log = history.to_json()
    try:
        atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata={"history": log}))
        atomic_write(path.with_name("log.json"), log.encode())
    except Exception as error:
        raise OSError(f"could not save {path}: {error}; the checkpoint saved before is untouched") from error


def _resume(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], run: dict[str, Any]
) -> History:
    """Put a checkpoint's tensors into model and optimizer, once all of them are known to fit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}
            history = History.from_json(file.metadata()["history"])
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to start afresh") from error
    old, new = history.run["config"], json.loads(json.dumps(run["config"]))
    differ = [
        f"{name}: {old.get(name)!r} in the checkpoint, {new.get(name)!r} now"
        for name in sorted({*old, *new} - {*_FREE_ON_RESUME}) if old.get(name) != new.get(name)
    ]
    parameters = _trained_names(model)
    here = {f"model.{name}": list(p.shape) for name, p in parameters.items()}
    here |= {f"buffer.{name}": list(b.shape) for name, b in model.named_buffers()}
    there = {name: list(t.shape) for name, t in saved.items() if not name.startswith("optimizer.")}
    differ += [
        f"{name}: {there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} now"
        for name in sorted({*here, *there}) if here.get(name) != there.get(name)
    ]
    if differ:
        raise ValueError(f"{path} is of another run: {'; '.join(differ[:8])}. Use another out_dir")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[f"model.{name}"])
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[f"buffer.{name}"])
    for optimizer in optimizers:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            if id(parameter) in mine:
                optimizer.state[parameter] = _remembered(optimizer, saved, name, parameter)
    history.run = {**run, "resumed": history.run.get("resumed", 0) + 1}
    return history


def _remembered(
    optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], name: str, parameter: nn.Parameter
) -> dict[str, Tensor]:
    """The saved state of one parameter, each tensor where its optimizer wants it."""
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": saved[f"optimizer.momentum_buffer.{name}"].to(parameter.device)}
    # AdamW counts its steps on the CPU, except when fused; its averages lie where the parameter lies.
    counter = parameter.device if optimizer.defaults["fused"] else "cpu"
    return {
        "step": saved[f"optimizer.step.{name}"].to(counter),
        "exp_avg": saved[f"optimizer.exp_avg.{name}"].to(parameter.device),
        "exp_avg_sq": saved[f"optimizer.exp_avg_sq.{name}"].to(parameter.device),
    }


# --- time, progress, description ------------------------------------------------------------------


class _Clock:
    """Seconds of training, evaluations and checkpoints left out."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.zero = time.perf_counter() - seconds

    def seconds(self) -> float:
        return time.perf_counter() - self.zero

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.zero += time.perf_counter() - begin


def _progress_bar(steps: int, done: int, enabled: bool) -> Any:
    from tqdm import tqdm

    silent = not enabled or bool(os.environ.get("CI"))
    return tqdm(total=steps, initial=done, desc="training", unit="step", delay=5, disable=silent)


def _describe(model: nn.Module, config: TrainConfig, device: torch.device, world: int) -> dict[str, Any]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": trained,
        "hardware": name,
        "processes": world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }
