"""The task that CoT-Influx is trained on here: questions with 12 candidate shots, good, idle and spoilt.

A task asks for one fact about an invented person, which only its shots tell: 2 *relevant* shots state it,
each in other words and beside another fact of that person; 6 *irrelevant* ones are about other people, the
asked relation among their facts; 4 *corrupted* ones give that person another value, their words in random
order. All twelve do not fit the limit of 160 tokens. Names of evaluation tasks occur in no training task.

A shot here is a passage of facts, not a solved example: our models read `Context:` lines, and use nothing
from question-answer pairs that stand there in place of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from refimpl.kvcache.prompt.cot_influx import encode
from refimpl.scoring import score_completions
from refimpl.world.base import Split
from refimpl.world.documents import people
from refimpl.world.relations import RELATIONS, ask, state
from refimpl.world.rng import Rng
from refimpl.world.tokens import EOT

LIMIT = 160
LAYER = 6  # of 12: of the even layers, the one from which a linear probe told the three kinds apart best
KINDS = ("relevant",) * 2 + ("irrelevant",) * 6 + ("corrupted",) * 4
ASKED = ("lives_in", "works_as", "works_for", "studied_at", "has_pet", "born_in", "likes", "owns", "plays",
         "enjoys")  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One question in token ids: `head` + kept tokens of `shots` + `question` is the prompt."""

    head: list[int]
    shots: list[list[int]]
    question: list[int]
    answer: list[int]
    kinds: list[str]  # of each shot, for evaluation only
    text: str

    @property
    def fixed(self) -> int:
        """Tokens of the prompt that are never pruned."""
        return len(self.head) + len(self.question)


def make_task(seed: int, split: Split, tokenizer: Any) -> Task:
    """Draw a task; the same seed and split give the same one.

    Parameters: seed; split, whose names are used: "train" or "eval" (the wording is that of training);
    tokenizer, the bundled one. Raises ValueError for another split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    rng = Rng("cot influx", seed, split)
    person, *others = rng.sample(people(split), 1 + KINDS.count("irrelevant"))
    asked, *more = rng.sample(ASKED, 4)
    answer, *wrong = rng.sample(RELATIONS[asked].values, len(KINDS))

    def passage(name: str, value: str, spoil: bool) -> str:
        other = rng.choice(more)
        said = [state(asked, name, value, rng), state(other, name, rng.choice(RELATIONS[other].values), rng)]
        rng.shuffle(said)
        words = " ".join(said).replace(".", "").split(" ")
        if spoil:
            rng.shuffle(words)
        return " ".join(words) + ".\n" if spoil else " ".join(said) + "\n"

    shots = []
    for i, kind in enumerate(KINDS):
        name = others.pop() if kind == "irrelevant" else person
        shots.append(
            (passage(name, answer if kind == "relevant" else wrong[i - 1], kind == "corrupted"), kind)
        )
    rng.shuffle(shots)
    question = f"Question: {ask(asked, person, rng)}\nAnswer:"
    texts = ["Context:\n", question, f" {answer}", *(text for text, _ in shots)]
    head, asks, answers, *ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    text = texts[0] + "".join(texts[3:]) + question + texts[2]
    return Task([EOT, *head], ids, asks, answers, [kind for _, kind in shots], text)


def budgets(tasks: Sequence[Task], limit: int) -> LongTensor:
    """Return the tokens [Q] that the limit leaves for shots; ValueError where a question alone exceeds it."""
    left = torch.tensor([limit - task.fixed for task in tasks])
    if bool((left < 0).any()):
        raise ValueError(f"limit: {limit} tokens are fewer than the {limit - int(left.min())} of a question")
    return left


def rollout(llm: nn.Module, tasks: Sequence[Task], keep: Tensor) -> dict[str, Tensor]:
    """Ask the frozen LLM with pruned prompts.

    Parameters: llm; tasks, Q; keep, bool [..., Q, k, N]: which token of which shot is kept. Returns `loss`
    (mean nats of the gold answer's tokens), `correct` (greedy decoding gives it) and `tokens` of the prompt,
    each [..., Q] on the CPU. Raises ValueError where keep does not fit the tasks.
    """
    flat = keep.reshape(-1, *keep.shape[-3:]).cpu().numpy()
    if flat.shape[1] != len(tasks) or any(len(task.shots) != flat.shape[2] for task in tasks):
        raise ValueError(f"keep: shape {list(keep.shape)} does not fit {len(tasks)} tasks")
    items = []
    for sample in flat:
        for task, rows in zip(tasks, sample, strict=True):
            shots = [
                token for shot, row in zip(task.shots, rows, strict=True)
                for token, kept in zip(shot, row, strict=False) if kept
            ]  # fmt: skip
            items.append(([*task.head, *shots, *task.question], task.answer))
    scores = score_completions(llm, items)
    found = {
        "loss": torch.from_numpy(scores.nll / scores.tokens),
        "correct": torch.from_numpy(scores.exact),
        "tokens": torch.tensor([len(prompt) for prompt, _ in items]),
    }
    return {name: value.view(keep.shape[:-2]) for name, value in found.items()}


def read(llm: nn.Module, tasks: Sequence[Task], layer: int) -> tuple[Tensor, Tensor]:
    """Return the features and mask of tasks, `encode` with the question in front."""
    return encode(llm, [task.question for task in tasks], [task.shots for task in tasks], layer)
