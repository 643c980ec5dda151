"""The status page: what stands, the gates, what each notebook costs, and how old each stored measurement is.

Formats read here (a missing file is said on the page, a malformed one stops the build):
- refimpl/world/gates.toml: [[gate]] with name, spec, unit, is, at (a number, or one a model) and level;
- data/models/NAME/evaluation.json: {"gates": [...]}, with the fields of `refimpl.world.gates.GateResult`;
- book/_static/runs.json: {notebook path: {"seconds", "peak_mb"}};
- data/results/**/*.json: what `refimpl.results.store` writes.
"""
from __future__ import annotations

import json
import tomllib
from pathlib import Path

from pages import NOTICE, cell, table
from refimpl.results import changed_sources
from refimpl.systems import CHAPTERS, VERDICTS, System

_AGE_SCRIPT = """```{raw} html
<script>
document.querySelectorAll("time.measured").forEach(function (when) {
  var days = Math.floor((Date.now() - Date.parse(when.dateTime)) / 86400000);
  if (days >= 0) { when.textContent += " (" + days + (days === 1 ? " day" : " days") + " ago)"; }
});
</script>
```
"""


def _json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _progress(rows: tuple[System, ...]) -> str:
    lines = []
    for number, (chapter, title) in enumerate(CHAPTERS.items()):
        here = [row for row in rows if row.chapter == chapter]
        built = [row for row in here if not row.coming]
        lines.append([f"{number} {title}", str(len(here)), str(len(built))]
                     + [str(sum(row.verdict == verdict for row in built) or "–") for verdict in VERDICTS])
    totals = ["**all**", str(len(rows)), str(sum(not row.coming for row in rows))]
    totals += [str(sum(row.verdict == verdict for row in rows) or "–") for verdict in VERDICTS]
    return table(["chapter", "rows", "built", *VERDICTS], [*lines, totals])


def _threshold(gate: dict) -> str:
    at = gate["at"]
    if isinstance(at, dict):
        return f"{gate['is']} " + ", ".join(f"{value:g} (`{model}`)" for model, value in at.items())
    return f"{gate['is']} {at:g}"


def _measured(result: dict | None) -> str:
    if result is None or result["passed"] is None:
        return "–"
    mark = "✓" if result["passed"] else "✗ **missed**"
    return f"{mark} {result['value']:.3g} [{result['lo']:.3g}, {result['hi']:.3g}]"


def _gates(root: Path) -> str:
    source = root / "refimpl" / "world" / "gates.toml"
    if not source.is_file():
        return "The table of gates is not written yet.\n"
    gates = tomllib.loads(source.read_text(encoding="utf-8"))["gate"]
    found = {path.parent.name: {result["name"]: result for result in _json(path)["gates"]}
             for path in sorted((root / "data" / "models").glob("*/evaluation.json"))}
    note = "" if found else "No model has been evaluated yet.\n\n"
    lines = [[cell(gate["name"]), gate["level"], cell(gate["unit"]), _threshold(gate), cell(gate["spec"]),
              *(_measured(results.get(gate["name"])) for results in found.values())] for gate in gates]
    head = ["gate", "level", "measured as", "threshold", "for", *(f"`{name}`" for name in found)]
    return note + table(head, lines)


def _notebooks(root: Path) -> str:
    path = root / "book" / "_static" / "runs.json"
    if not path.is_file():
        return "No notebook has been executed by `make notebooks` yet.\n"
    runs = _json(path)
    lines = [[f"`{name}`", f"{run['seconds']:.0f} s", f"{run['peak_mb'] / 1024:.1f} GB"]
             for name, run in sorted(runs.items())]
    for chapter in sorted({name.rpartition("/")[0] for name in runs}):
        own = [run for name, run in runs.items() if name.rpartition("/")[0] == chapter]
        lines.append([f"**`{chapter}`**", f"{sum(run['seconds'] for run in own) / 60:.1f} min",
                      f"{max(run['peak_mb'] for run in own) / 1024:.1f} GB at most"])
    lines.append(["**all**", f"{sum(run['seconds'] for run in runs.values()) / 60:.1f} min",
                  f"{max(run['peak_mb'] for run in runs.values()) / 1024:.1f} GB at most"])
    return table(["notebook", "time", "peak memory"], lines)


def _results(root: Path) -> str:
    paths = sorted((root / "data" / "results").glob("**/*.json"))
    if not paths:
        return "No measurement is stored yet.\n"
    lines = []
    for path in paths:
        result = _json(path)
        changed = changed_sources(result, root)
        state = f"**stale**: {', '.join(f'`{name}`' for name in changed)} changed" if changed else "current"
        when = f'<time class="measured" datetime="{result["date"]}">{result["date"]}</time>'
        lines.append([f"`{path.relative_to(root / 'data' / 'results')}`", f"`{cell(result['command'])}`",
                      cell(result["hardware"]), when, cell(result["summary"]), state])
    head = ["result", "made by", "on", "measured", "what came out", "state"]
    return table(head, lines) + "\n" + _AGE_SCRIPT


def _adapter(root: Path) -> str:
    """What the adapter for new wording does to the gates that its model misses."""
    path = root / "data" / "adapters" / "reading-llama-mini.json"
    if not path.is_file():
        return ""
    log = _json(path)
    before = _json(root / "data" / "models" / log["model"] / "evaluation.json")["gates"]
    missed = {gate["name"] for gate in before if gate["level"] == "must" and gate["passed"] is False}
    found = [f"{gate['name']} {_measured(gate)}" for gate in log["gates"] if gate["name"] in missed]
    return f"\n`{log['model']}` with its reading adapter (`{path.stem}.safetensors`): {'; '.join(found)}.\n\n"


def page(rows: tuple[System, ...], root: Path) -> str:
    """Render the status page from the catalogue and whatever results the tree holds."""
    return f"""{NOTICE}# Status

Written by `python tools/build_pages.py` from the catalogue and the stored results; no number here is typed.

## Rows and verdicts

{_progress(rows)}
## Gates of our models

What each of our pretrained models can do, against bars that were written down before training. A **must**
gate is what chapters rely on: where a model misses one, they use the other mini, or say so, until that
model is trained again. A **should** gate is a hope; a chapter that needs one that is missed trains for it.
Values carry their 95 % interval; a dash means that the gate does not bind that model.

{_gates(root)}{_adapter(root)}
## Time and memory of every notebook

{_notebooks(root)}
## Stored measurements

{_results(root)}"""
