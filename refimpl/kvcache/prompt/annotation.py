"""LLMLingua-2, the data: which words of a text did the teacher keep, and which pairs can be trusted.

Implements arXiv 2403.12968, section 3 (annotation, Algorithm 1; quality control by variation rate and
alignment gap). A teacher was asked to compress by deletion only; it still rewords, reorders and repeats.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 150
_WORDS = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]+")
_IRREGULAR = {"is": "be", "are": "be", "was": "be", "were": "be", "been": "be", "has": "have", "had": "have",
              "went": "go", "gone": "go", "born": "bear", "held": "hold", "took": "take", "became": "become",
              "began": "begin", "owes": "owe", "done": "do", "does": "do", "knows": "know"}  # fmt: skip


def split_words(text: str) -> list[str]:
    """Words and runs of punctuation; the same words that `units.words` finds.

    >>> split_words("He's in Ripon.")
    ["He's", 'in', 'Ripon', '.']
    """
    return _WORDS.findall(text)


def lemma(word: str) -> str:
    """A lower-case base form by a few rules of English; crude, but the same for both texts.

    >>> [lemma(w) for w in ("Lives", "living", "lived", "Ripon", "was")]
    ['liv', 'liv', 'liv', 'ripon', 'be']
    """
    word = word.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, shortest in (("ing", 6), ("ies", 5), ("ed", 5), ("es", 5), ("s", 4), ("e", 4)):
        if word.endswith(ending) and len(word) >= shortest and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


@dataclass(frozen=True)
class Annotation:
    """Labels of the original's words, and how far they can be trusted.

    Parameters: `labels`, True for a word that the compression keeps; `variation`, share of compressed words
    that are not in the original; `hitting`, those that are, over the original's length; `matching`,
    share of True labels. The alignment gap, hitting - matching, counts words that occur but found no place.
    """

    labels: list[bool]
    variation: float
    hitting: float
    matching: float

    @property
    def gap(self) -> float:
        return self.hitting - self.matching


def annotate(
    original: Sequence[str], compressed: Sequence[str], *, window: int = WINDOW,
    lemma: Callable[[str], str] = lemma,
) -> Annotation:  # fmt: skip
    """Label the words of `original` that `compressed` keeps.

    Each compressed word looks for a free equal word (by lemma) around a pointer, at distances 0, 1, 2, ... <
    window, ahead before behind; the found place becomes the pointer, which jumps ahead by half a window at
    most. A place is taken once, so every True label has its own word in the compression.

    Raises ValueError for an original without words or a window < 1. An empty compression labels nothing.

    >>> annotate("the cat saw the dog".split(), "dog the".split()).labels
    [False, False, False, True, True]
    """
    if not original:
        raise ValueError("original: empty; at least one word is needed")
    if window < 1:
        raise ValueError(f"window: {window}; allowed: an int >= 1")
    own = [lemma(word) for word in original]
    wanted = [lemma(word) for word in compressed]
    labels, pointer, known = [False] * len(own), 0, set(own)
    for word in wanted:
        if word not in known:
            continue
        for distance in range(window):
            ahead, behind = pointer + distance, pointer - distance
            if ahead < len(own) and own[ahead] == word and not labels[ahead]:
                labels[ahead] = True
                pointer = ahead if distance <= window // 2 else pointer + window // 2
                break
            if behind >= 0 and own[behind] == word and not labels[behind]:
                labels[behind] = True
                pointer = behind
                break
    found = sum(word in known for word in wanted)
    variation = 1 - found / len(wanted) if wanted else 1.0
    return Annotation(labels, variation, found / len(own), sum(labels) / len(own))


def trusted(annotations: Sequence[Annotation], worst: float = 0.1) -> list[int]:
    """Indices of the pairs that survive both filters, ascending.

    First the share `worst` of highest variation rate goes, then of the rest the share `worst` of largest
    alignment gap; shares are rounded down, of equal pairs the later go. By rank, not by percentile: with a
    percentile of 0 the official `>=` drops every pair. (Its second pass also pairs the remaining rows with a
    list of the unfiltered ones.)

    Raises ValueError unless 0 <= worst < 1.
    """
    if not 0 <= worst < 1:
        raise ValueError(f"worst: {worst}; allowed: 0 <= worst < 1")
    left = np.arange(len(annotations))
    for measure in ("variation", "gap"):
        values = np.array([getattr(annotations[i], measure) for i in left])
        keep = len(left) - int(worst * len(left) + 1e-9)
        left = np.sort(left[np.argsort(values, kind="stable")[:keep]])
    return left.tolist()
