"""The checks of LLMLingua-2 (kv-cache spec, 28): annotation of a compression, and pruning by a classifier."""

from collections.abc import Callable

import torch
from torch import LongTensor, Tensor, nn

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {
    "llmlingua2": "refimpl.kvcache.prompt.llmlingua2:LLMLingua2",
    "llmlingua2_annotation": "refimpl.kvcache.prompt.annotation:annotate",
}
# A word may be written in several tokens: those that do not begin with a space continue it.
PIECES = [" Kor", "rin", " lives", " in", " Red", "car", ".", " She", " is", " a", " bak", "er", "."]
WORDS = [0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9]
KEEP = [0.9, 0.3, 0.8, 0.1, 0.2, 0.98, 0.05, 0.62, 0.15, 0.02, 0.7, 0.74, 0.05]


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return PIECES[ids[0]]


class Classifier(nn.Module):
    """Says KEEP, whatever stands around a token."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.head = 64, nn.Linear(2, 2)

    def forward(self, ids: LongTensor, mask: Tensor | None = None) -> Tensor:
        p = torch.tensor(KEEP)[ids]
        return torch.stack([torch.zeros_like(p), (p / (1 - p)).log()], -1)


@check
def check_llmlingua2(LLMLingua2: Callable) -> None:
    """`LLMLingua2(classifier, tokenizer, force=)` with `prune(ids, budget)` -> `keep` and `scores`."""
    ids = torch.arange(len(PIECES))
    means = [sum(KEEP[i] for i in range(13) if WORDS[i] == w) / WORDS.count(w) for w in range(10)]
    pruned = LLMLingua2(Classifier(), Tokenizer()).prune(ids, 7)
    expected = torch.tensor([means[w] for w in WORDS])
    require_close(pruned.scores, expected, 1e-5, "the scores: mean p(keep) over the tokens of a word")
    for budget in range(1, 14):
        got = LLMLingua2(Classifier(), Tokenizer()).prune(ids, budget).keep.tolist()
        words = _words(means, budget)
        want = [i for i in range(13) if WORDS[i] in words]
        require(got == want, f"the tokens kept at a budget of {budget}: {got} instead of {want}")
    forced = LLMLingua2(Classifier(), Tokenizer(), force={"."}).prune(ids, 5).keep.tolist()
    require({6, 12} <= set(forced), f"full stops are forced at a budget of 5, but {forced} stay")
    require(len(forced) <= 5, f"{len(forced)} tokens stay at a budget of 5 with forced words")


def _words(means: list[float], budget: int) -> set[int]:
    kept, left = set(), budget
    for word in sorted(range(10), key=lambda w: -means[w]):
        left -= WORDS.count(word)
        if left < 0:
            break
        kept.add(word)
    return kept


CASES = [  # (original, compression, labels)
    ("the cat saw the dog", "cat dog", "01001"),
    ("the cat saw the dog", "the dog", "10001"),
    ("a b a b a b", "a b b", "110100"),  # a repeated word takes a place once, the nearest ahead
    ("a b c d a b", "c d a", "001110"),  # the first "a" is further from the pointer than the second
    ("one two three four", "four one", "1001"),  # reordered: found behind the pointer
    ("Ann lives here and Bob lives there", "Ann live Bob lived", "1100110"),  # by lemma
    ("red RED red", "Red red red red", "111"),  # whatever the case; the fourth finds no place
    ("one two three", "uno due", "000"),
    ("one two three", "", "000"),
]


@check
def check_llmlingua2_annotation(annotate: Callable) -> None:
    """`annotate(original, compressed, window=)` -> `labels`, `variation`, `hitting`, `matching`, `gap`."""
    for original, compressed, labels in CASES:
        words, kept = original.split(), compressed.split()
        got = annotate(words, kept)
        case = f"{compressed!r} of {original!r}"
        written = "".join(str(int(label)) for label in got.labels)
        require(written == labels, f"the labels of {case}: {written} instead of {labels}")
    got = annotate("a b c d".split(), "a a x d".split())
    numbers = torch.tensor([got.variation, got.hitting, got.matching, got.gap])
    require_close(numbers, torch.tensor([0.25, 0.75, 0.5, 0.25]), 1e-6, "variation, hitting, matching, gap")
    far = ["x"] * 20 + ["y"]
    for window, found in ((20, False), (21, True)):
        label = annotate(far, ["y"], window=window).labels[20]
        require(bool(label) == found, f"a word 20 places ahead in a window of {window}: label {label}")
    # The pointer jumps ahead by at most half a window, so what lies behind a far match is still in reach.
    text = ["p", "q", *["x"] * 15, "y"]
    got = annotate(text, ["p", "y", "q"], window=20).labels
    require(bool(got[1]), "after a match 17 places ahead (window 20) the word at place 1 is out of reach")
