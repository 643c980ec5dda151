"""Write data/world/tokens.md: the special ids, and how many tokens the words of every pool are.

    python tools/token_table.py
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from refimpl.paths import atomic_write, data_file  # noqa: E402
from refimpl.world import lexicon  # noqa: E402
from refimpl.world.formats import BY_NAME  # noqa: E402
from refimpl.world.groups_dialects import GROUPS  # noqa: E402
from refimpl.world.names import known_people, names  # noqa: E402
from refimpl.world.rng import Rng  # noqa: E402
from refimpl.world.rude_words import RUDE  # noqa: E402
from refimpl.world.tokens import SPECIAL, VOCAB_SIZE  # noqa: E402

# Pools whose words are one token each, after a space; the others are as the frozen merges cut them.
SINGLE = ("FIRST_NAMES", "SURNAMES", "TOWNS", "JOBS", "COMPANIES", "SCHOOLS", "OBJECTS", "ANIMALS", "FOODS",
          "CODES")  # fmt: skip
OTHER = ("COLORS", "HOBBIES", "INSTRUMENTS", "MONTHS", "WEEKDAYS", "NUMBER_WORDS")
SAMPLE = 100  # documents per format


def pools() -> dict[str, tuple[str, ...]]:
    """Every pool of words: name -> words."""
    return {
        **{name: getattr(lexicon, name) for name in (*SINGLE, *OTHER)},
        "invented names, training": names("train"),
        "invented names, evaluation": names("eval"),
        "known people": known_people(),
        "numbers 10-99": tuple(map(str, range(10, 100))),
        "groups": tuple(GROUPS),
        "rude words": tuple(RUDE),
    }


def generate() -> str:
    """The text of the table."""
    from tokenizers import Tokenizer

    file = data_file("models", "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))

    def lengths(texts) -> list[int]:
        return [len(e.ids) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    out = [
        "# Tokens of the world", "",
        f"Written by `tools/token_table.py` from the frozen tokenizer ({VOCAB_SIZE} ids, SHA-256 "
        f"`{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}…`).", "",
        "## Special ids", "", "| id | token |", "|--:|---|",
        *(f"| {i} | `{token}` |" for i, token in enumerate(SPECIAL)), "",
        "## Pools", "",
        "Tokens of each word after a space. A pool with more than one length lists its longer words.", "",
        "| pool | words | 1 | 2 | 3 | more | words longer than the usual |", "|---|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    for name, words in pools().items():
        found = lengths(f" {w}" for w in words)
        count = Counter(min(n, 4) for n in found)
        usual = count.most_common(1)[0][0]
        longer = [w for w, n in zip(words, found, strict=True) if n > usual]
        listed = ", ".join(longer) if len(longer) <= 40 else f"{len(longer)} of them"
        cells = " | ".join(str(count[n]) for n in range(1, 5))
        out.append(f"| {name} | {len(words)} | {cells} | {listed} |")
    out += [
        "", "## Formats", "", f"Tokens of a training document, over {SAMPLE} documents of each format.", "",
        "| format | prompt ends with | mean | longest | bytes per token |", "|---|---|--:|--:|--:|",
    ]  # fmt: skip
    for name, form in BY_NAME.items():
        rng = Rng("token table", name)
        texts = [form.document(rng) for _ in range(SAMPLE)]
        found = lengths(texts)
        ratio = sum(len(t.encode()) for t in texts) / sum(found)
        boundary = f"`{form.boundary}`" if form.boundary else ""
        out.append(f"| {name} | {boundary} | {sum(found) / SAMPLE:.1f} | {max(found)} | {ratio:.2f} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    target = data_file("world", "tokens.md")
    atomic_write(target, generate().encode())
    print(f"wrote {target.relative_to(ROOT)}")
