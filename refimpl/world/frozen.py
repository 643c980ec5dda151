"""What is frozen of the world: questions T0-T9 of the RAG spec, long dialogues (T5), and what was planted.

It lies in `data/world`, each file with its SHA-256 in `checksums.json`. The documents that the questions are
about are not stored: `load_world()` generates them and compares their digest with the stored one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from refimpl.paths import data_file
from refimpl.world.questions import Question, World, questions, world

KINDS = ("T0", "T1", "T2", "T3", "T4", "T6", "T7", "T8", "T9")  # T5 are the questions of `load_dialogues`
SEED, SIZE, PER_KIND = 0, 2000, 300
TURN_COLUMNS = ("session", "date", "hours", "by", "act", "topic", "importance", "clause", "start", "end")
_WORLD = f"world({SEED}, {SIZE})"
_REMEDY = "reinstall refimpl or restore the file from git"


def _checksums() -> dict[str, str]:
    file = data_file("world", "checksums.json")
    if not file.is_file():
        raise FileNotFoundError(f"the frozen evaluation sets are not installed: no {file}; {_REMEDY}")
    return json.loads(file.read_text())


def _read(name: str) -> str:
    """The text of a file below data/world, after its checksum was verified."""
    file, right = data_file("world", name), _checksums().get(name)
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; {_REMEDY}")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != right:
        raise ValueError(f"{file}: its content does not match checksums.json; {_REMEDY}")
    return content.decode()


def load_questions(kind: str) -> list[Question]:
    """The 300 frozen questions of one kind about the documents of `load_world()`.

    Parameters
    ----------
    kind : str
        "T0" ... "T4", "T6" ... "T9"; the questions T5 come with `load_dialogues()`.

    Raises
    ------
    ValueError
        For another kind, or when the file is not what was frozen.
    FileNotFoundError
        When the data are not installed.

    Examples
    --------
    >>> rows = load_questions("T2")
    >>> len(rows), rows[0].type, rows[0].answer in rows[0].candidates
    (300, 'T2', True)
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)} (load_dialogues() gives T5)")
    pools, *rows = map(json.loads, _read(f"questions/{kind}.jsonl").splitlines())
    return [Question(**{**row, "candidates": list(pools[row["candidates"]])}) for row in rows]


def load_dialogues() -> list[dict]:
    """The frozen long dialogues with their questions (T5).

    Returns
    -------
    list of dict
        "id", "text", "boundaries", "questions" and "turns" as `long_dialogue` makes them, but without the
        facts of each turn: the format "dialogue" reads them from the text.

    Raises
    ------
    ValueError
        When the file is not what was frozen.
    FileNotFoundError
        When the data are not installed.

    Examples
    --------
    >>> d = load_dialogues()[0]
    >>> d["text"][slice(*d["turns"][3]["span"])] == d["turns"][3]["text"]
    True
    """
    out = []
    for line in _read("questions/T5.jsonl").splitlines():
        row = json.loads(line)
        turns = []
        for i, values in enumerate(row["turns"]):
            turn = dict(zip(TURN_COLUMNS, values, strict=True))
            span = [turn.pop("start"), turn.pop("end")]
            here = {"boundary": i in row["boundaries"], "span": span, "text": row["text"][slice(*span)]}
            turns.append({"id": i, **turn, **here})
        out.append({**row, "turns": turns})
    return out


def load_manifest() -> dict:
    """What was planted in the training text.

    Returns
    -------
    dict
        "canaries": id, type, text, tokens, copies, when, steps ([first, end) of the steps in which copies
        lie; empty for a twin, which was never trained on). "people": name, tokens, mentions of each
        attribute, withheld from `llama-nano-clean`, facts. "documents": how many documents of known people
        were kept and withheld. "steps": length of the run.

    Raises
    ------
    ValueError
        When the file is not what was frozen.
    FileNotFoundError
        When the data are not installed.

    Examples
    --------
    >>> m = load_manifest()
    >>> len(m["people"]), sum(p["withheld"] for p in m["people"])
    (200, 100)
    """
    return json.loads(_read("manifest.json"))


def world_digest(w: World) -> str:
    """SHA-256 (hex) of everything that questions refer to: documents, facts, aliases, sessions."""
    content = [[asdict(d) for d in w.documents], w.facts, w.aliases, w.sessions]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_world() -> World:
    """The world that the frozen questions are about, generated (about a second) and verified.

    Raises ValueError when this machine generates another world than the frozen one.

    Examples
    --------
    >>> w = load_world()
    >>> ((doc, _, start, end), *_), *_ = load_questions("T1")[0].gold
    >>> w.documents[doc].text[start:end].endswith(".")
    True
    """
    w = world(SEED, SIZE)
    questions(w, "T9", PER_KIND)  # draws the sessions
    if world_digest(w) != _checksums()[_WORLD]:
        raise ValueError(f"{_WORLD}: the generated documents are not the frozen ones; restore refimpl/world")
    return w
