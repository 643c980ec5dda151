"""What a format of the world is: facts drawn, facts written as text, text read back to the same facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from refimpl.world.rng import Rng

Split = Literal["train", "eval"]  # "eval" uses evaluation-only names and held-out templates
Facts = dict  # JSON-able; everything that `parse` recovers


@dataclass(frozen=True)
class Format:
    """One exact text format of the world.

    Parameters
    ----------
    name : str
        Unique, snake_case.
    sample : (rng, split) -> facts
        Draws the facts of one document. Facts are JSON-able.
    render : (facts, rng) -> str
        Writes them; `rng` chooses among surface forms only. A document ends with a newline.
    parse : str -> facts
        The exact inverse on clean text: `parse(render(facts, rng)) == facts` for every rng. Raises ValueError
        on text that is not of this format.
    boundary : str or None
        The string that ends the prompt (for example "Answer:"); what follows its last occurrence is the
        completion and starts with a space.
    serves : tuple of str
        The items of the specs that need this format ("interp E6", "rag T1", ...).
    """

    name: str
    sample: Callable[[Rng, Split], Facts]
    render: Callable[[Facts, Rng], str]
    parse: Callable[[str], Facts]
    boundary: str | None = None
    serves: tuple[str, ...] = ()

    def document(self, rng: Rng, split: Split = "train") -> str:
        """Sample and render one document."""
        return self.render(self.sample(rng, split), rng)

    def prompt(self, text: str) -> tuple[str, str]:
        """Cut `text` at the last boundary: (prompt, completion), the completion without its final newline."""
        if self.boundary is None:
            raise ValueError(f"format {self.name!r} has no prompt boundary")
        at = text.rfind(self.boundary)
        if at < 0:
            raise ValueError(f"text: no {self.boundary!r} in it, so it is not a {self.name!r} document")
        cut = at + len(self.boundary)
        return text[:cut], text[cut:].rstrip("\n")
