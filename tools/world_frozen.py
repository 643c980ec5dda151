"""Write all that is frozen of the world: pins, manifest, question sets, and the checksums of these.

    python tools/world_frozen.py

Running this again is only right together with pretraining every model again: until then every file must come
out as it is (a test compares).
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import world_manifest  # noqa: E402

from refimpl.paths import atomic_write, data_file  # noqa: E402
from refimpl.world.formats import BY_NAME  # noqa: E402
from refimpl.world.frozen import KINDS, PER_KIND, SEED, SIZE, TURN_COLUMNS, world_digest  # noqa: E402
from refimpl.world.long_dialogues import long_dialogue  # noqa: E402
from refimpl.world.pins import LENGTHS, format_digest  # noqa: E402
from refimpl.world.questions import Question, World, questions, world  # noqa: E402
from refimpl.world.rng import Rng  # noqa: E402

N_DIALOGUES = 12
_DEFAULTS = {
    f.name: f.default if f.default_factory is MISSING else f.default_factory()
    for f in fields(Question)
    if f.default is not MISSING or f.default_factory is not MISSING
}


def _line(row: dict | list) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"


def question_file(w: World, kind: str) -> str:
    """The different lists of candidates, then one question a line, which names its list by number.

    Fields that hold their default are left out.
    """
    pools: dict[tuple[str, ...], int] = {}
    lines = []
    for q in questions(w, kind, PER_KIND):
        row = {k: v for k, v in asdict(q).items() if k not in _DEFAULTS or v != _DEFAULTS[k]}
        lines.append(_line({**row, "candidates": pools.setdefault(tuple(q.candidates), len(pools))}))
    return _line(list(pools)) + "".join(lines)


def dialogue_file() -> str:
    """One long dialogue a line; a turn is a list in the order of TURN_COLUMNS."""
    out = []
    for i in range(N_DIALOGUES):
        d = long_dialogue(Rng("frozen", "T5", i))
        turns = []
        for turn in d["turns"]:
            start, end = turn["span"]
            hours = round(turn["hours"], 4)  # to a third of a second
            row = {**turn, "session": turn["ref"][0], "hours": hours, "start": start, "end": end}
            turns.append([row[column] for column in TURN_COLUMNS])
        asked = [{**q, "id": f"T5-{i:02d}-{q['id'][1:]}"} for q in d["questions"]]
        row = {"id": f"T5-{i:02d}", "text": d["text"], "boundaries": d["boundaries"], "turns": turns}
        out.append(_line({**row, "questions": asked}))
    return "".join(out)


def pin_file() -> str:
    """The digests of every format at every length, one format a line."""
    rows = [f'"{name}": {json.dumps({str(n): format_digest(name, n) for n in LENGTHS})}' for name in BY_NAME]
    return "{" + ",\n".join(rows) + "}\n"


def generate(pins: bool = True) -> dict[str, str]:
    """Every file by its name below data/world, checksums.json last; without `pins`, pins.json is read."""
    w = world(SEED, SIZE)
    out = {f"questions/{kind}.jsonl": question_file(w, kind) for kind in KINDS}
    out["questions/T5.jsonl"] = dialogue_file()
    out["manifest.json"] = world_manifest.generate()
    out["pins.json"] = pin_file() if pins else data_file("world", "pins.json").read_text()
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(out.items())}
    sums[f"world({SEED}, {SIZE})"] = world_digest(w)
    out["checksums.json"] = json.dumps(sums, indent=1) + "\n"
    return out


if __name__ == "__main__":
    data_file("world", "questions").mkdir(parents=True, exist_ok=True)
    for name, text in generate().items():
        atomic_write(data_file("world", name), text.encode())
        print(f"{len(text.encode()):9d} bytes  data/world/{name}")
