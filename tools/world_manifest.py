"""Write data/world/manifest.json: every canary and twin, and every known person, with token ids and counts.

    python tools/world_manifest.py
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from refimpl.paths import atomic_write, data_file  # noqa: E402
from refimpl.world.canaries import canaries_of_shard, copies_in_shard, manifest  # noqa: E402
from refimpl.world.mix import N_STEPS, PLANNED_SHARDS, STEPS_PER_SHARD, WARM_SHARDS  # noqa: E402
from refimpl.world.names import known_people  # noqa: E402
from refimpl.world.people import ATTRIBUTES, MENTIONS_PER_DOCUMENT, stratum, withheld  # noqa: E402
from refimpl.world.relations import known_facts  # noqa: E402


def generate() -> str:
    """The text of the manifest, one canary or person a line."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data_file("models", "tokenizer.json")))
    frozen = hashlib.sha256(data_file("models", "tokenizer.json").read_bytes()).hexdigest()

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    steps: dict[str, list[int]] = {}
    for at in range(PLANNED_SHARDS):  # nothing is planted in the warm-up before them
        shard = WARM_SHARDS + at
        for canary in canaries_of_shard(at, PLANNED_SHARDS):
            first = steps.setdefault(canary.id, [shard * STEPS_PER_SHARD, 0])[0]
            steps[canary.id] = [first, (shard + 1) * STEPS_PER_SHARD]
    canaries = [
        {"id": c.id, "type": c.type, "copies": c.copies, "when": c.when, "steps": steps.get(c.id, []),
         "text": c.text, "tokens": ids(c.text)}
        for c in manifest()
    ]  # fmt: skip
    away, facts = withheld(), known_facts()
    people = [
        {"name": p, "mentions": stratum(p), "withheld": p in away, "tokens": ids(f" {p}"),
         "facts": {relation: facts[p, relation] for relation in ATTRIBUTES}}
        for p in known_people()
    ]  # fmt: skip
    documents = {"kept": 0, "withheld": 0}
    for at in range(PLANNED_SHARDS):
        mentions = {"kept": 0, "withheld": 0}
        for p in known_people():
            half = "withheld" if p in away else "kept"
            for relation in ATTRIBUTES:
                mentions[half] += copies_in_shard(f"{p}/{relation}", stratum(p), at, PLANNED_SHARDS)
        for half, n in mentions.items():
            documents[half] += -(-n // MENTIONS_PER_DOCUMENT)
    head = {"tokenizer": frozen, "steps": N_STEPS, "steps_per_shard": STEPS_PER_SHARD, "documents": documents}
    lists = (("canaries", canaries), ("people", people))
    body = [f'"{name}": [\n' + ",\n".join(map(_line, rows)) + "\n]" for name, rows in lists]
    return _line(head)[:-1] + ",\n" + ",\n".join(body) + "}\n"


def _line(row: dict) -> str:
    return json.dumps(row, separators=(",", ":"))


if __name__ == "__main__":
    target = data_file("world", "manifest.json")
    atomic_write(target, generate().encode())
    print(f"wrote {target.relative_to(ROOT)}; now run tools/world_frozen.py, which stores its checksum")
