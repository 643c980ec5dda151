"""The sources of the book: complete, current, and free of what readers of other books complain about."""
import doctest
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

from refimpl import results, systems

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
sys.path += [str(ROOT / "tools"), str(BOOK / "_ext")]

import build_pages  # noqa: E402
from pages import catalogue, drawings, status  # noqa: E402

TYPED = re.compile(r"\b(Figure|Fig\.|Table|Equation|Eq\.)\s*\(?(\d+|[IVX]+)\b")
REMOTE_IMAGE = re.compile(r"!\[[^\]]*\]\(\s*https?:|<img[^>]+src\s*=\s*[\"']?https?:"
                          r"|\{(figure|image)\}\s*https?:")


def prose() -> dict[str, str]:
    """The Markdown of every hand-written page and of every Markdown cell, by where it stands."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
             for path in BOOK.rglob("*.md") if not {"_generated", "_static"} & set(path.parts)}
    for path in (ROOT / "chapters").rglob("*.ipynb"):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "markdown":
                texts[f"{path.relative_to(ROOT).as_posix()}, cell {number}"] = "".join(cell["source"])
    return texts


def test_generated_pages_are_up_to_date():
    assert not build_pages.stale(), f"old: {build_pages.stale()}; run python tools/build_pages.py"


def test_every_system_has_its_place_or_is_announced_with_its_chapter():
    index = (BOOK / "_generated" / "systems.md").read_text(encoding="utf-8").splitlines()
    lines = {match[1]: line for line in index if (match := re.search(r'<a id="system-([^"]+)">', line))}
    assert list(lines) == [row.id for row in systems.systems()]
    for row in systems.systems():
        place = f"coming with chapter {row.number}" if row.coming else Path(row.notebook).stem
        assert place in lines[row.id], f"{row.id}: the index does not say {place!r}"


def test_the_bibliography_has_the_survey_and_the_reading_list():
    text = (BOOK / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{([^,\s]+),", text, re.M)
    assert len(keys) == len(set(keys)), "a key occurs twice"
    numbers = sorted(int(match[1]) for key in keys if (match := re.match(r"s(\d+)_[a-z]", key)))
    assert numbers == list(range(1, 123))
    listed = {row.reading for row in systems.systems() if row.reading}
    assert listed <= set(keys), f"not in the bibliography: {sorted(listed - set(keys))}"
    assert {key for key in keys if key.startswith("b_")} <= listed
    for key in keys:
        assert re.match(r"(s\d+|b|x)_[a-z]+(19|20)\d\d[a-z0-9]+$", key), f"{key}: not a key of this book"
    for entry in re.split(r"^@", text, flags=re.M)[1:]:
        if not re.match(r"\w+\{s\d+_", entry):
            assert "shorthand" in entry, f"an entry without survey number needs a shorthand: {entry[:60]}"


def test_references_to_figures_and_equations_are_never_typed():
    """Of this book's own: those of the survey have fixed numbers and are named as the survey's."""
    for place, text in prose().items():
        if place == "book/errata.md":  # a page about the survey's numbers
            continue
        for match in TYPED.finditer(text):
            before = text[max(0, match.start() - 25):match.start()]
            assert "survey" in before, f"{place}: {match[0]!r} is typed: use {{numref}} or {{eq}}"


def test_no_image_comes_from_elsewhere():
    for place, text in prose().items():
        found = REMOTE_IMAGE.search(text)
        assert not found, f"{place}: {found[0]!r}: put the image into the repository"


def test_every_figure_of_a_page_has_alt_text():
    for place, text in prose().items():
        for block in re.findall(r"\{(?:figure|image)\}[^`]*?(?:```|:::)", text, re.S):
            assert re.search(r":alt: \S+ \S+", block), f"{place}: a figure without :alt:"


def test_every_notebook_is_in_the_table_of_contents():
    toc = "\n".join(line for line in (ROOT / "_toc.yml").read_text(encoding="utf-8").splitlines()
                    if not line.lstrip().startswith("#"))
    for path in (ROOT / "chapters").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            name = path.relative_to(ROOT).with_suffix("").as_posix()
            assert re.search(rf"file: {re.escape(name)}$", toc, re.M), f"{name} is not in _toc.yml"


def test_every_module_has_its_api_page():
    documented = re.findall(r"automodule:: (\S+)", "".join(
        path.read_text(encoding="utf-8") for path in (BOOK / "api").glob("*.md")))
    for path in (ROOT / "refimpl").rglob("[a-z]*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not {"checks", "_data"} & set(path.parts):  # the checks have one page, of what readers need
            assert name in documented, f"no page in book/api has '.. automodule:: {name}'"


def test_the_proofs_of_the_errata_hold():
    text = (BOOK / "errata.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.S | re.M)
    names: dict = {}
    for block in blocks:
        exec(compile(textwrap.dedent(block), "book/errata.md", "exec"), names)
    assert sum("assert" in block for block in blocks) >= 9


def test_every_erratum_has_a_proof_or_says_when_it_comes():
    text = (BOOK / "errata.md").read_text(encoding="utf-8")
    items = re.split(r"^(?=\S.*\n: )|^(?=- \*\*|## )", text, flags=re.M)
    items = [item for item in items if re.match(r"\S.*\n: |- \*\*", item)]
    items += [item for item in re.split(r"^(?=- )", text, flags=re.M) if item.startswith("- ")]
    assert len(items) > 50
    for item in items:
        assert "*Proof" in item, f"no proof: {item[:70]!r}"


def test_a_built_row_shows_its_claim_what_was_measured_and_the_verdict():
    row = systems.System(
        chapter="kvcache", id="toy", name="Toy | cache", kind="system", ref="113, Eq. 11",
        module="refimpl.kvcache.toy", check="toy", notebook="chapters/05_kvcache/05_01_toy.ipynb",
        fidelity="scaled: a smaller model", claim="It halves the cache.",
        measured="0.51 [0.49, 0.53], n = 100", verdict="not testable at this scale",
        scale="needs 7 B; tried 10 M")
    keys = catalogue.survey_keys(BOOK / "references.bib")
    link = "../../chapters/05_kvcache/05_01_toy.ipynb"
    index = catalogue.index_page((row,), keys)
    assert "Toy \\| cache" in index and "{cite}`s113_zhang2023h2o`, survey Eq.\u00a011" in index
    assert f"[05_01_toy]({link}), {{py:mod}}`refimpl.kvcache.toy`, check `toy`" in index
    claims = catalogue.claims_page((row,), keys)
    for words in (link, row.claim, row.fidelity, row.measured, f"{row.verdict}: {row.scale}"):
        assert words in claims


def test_the_map_links_every_chapter_and_follows_its_first_notebook(tmp_path):
    rows = systems.systems()
    svg = "{http://www.w3.org/2000/svg}"
    links = [a.get("href") for a in ElementTree.fromstring(drawings.book_map(rows, tmp_path)).iter(f"{svg}a")]
    assert sorted(links) == sorted(f"systems.html#systems-{chapter}" for chapter in systems.CHAPTERS)
    notebook = tmp_path / "chapters" / "05_kvcache" / "05_01_evict.ipynb"
    notebook.parent.mkdir(parents=True)
    notebook.write_text("{}", encoding="utf-8")
    assert "../../chapters/05_kvcache/05_01_evict.html" in drawings.book_map(rows, tmp_path)
    assert ElementTree.fromstring(drawings.front(rows)).get("aria-label")


def test_the_extension_that_reads_our_docstrings_does_what_it_says():
    pytest.importorskip("sphinx")
    found = doctest.testmod(importlib.import_module("plain_docstrings"))
    assert found.attempted >= 3 and not found.failed


# ---- the status page, on a small tree with every kind of result --------------------------------------------

@pytest.fixture
def tree(tmp_path):
    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        return path
    return tmp_path, put


def test_an_empty_tree_gives_a_page_that_says_so(tree):
    page = status.page(systems.systems(), tree[0])
    for words in ("not written yet", "No notebook has been executed", "No measurement is stored"):
        assert words in page


def test_a_changed_source_marks_a_result_as_stale(tree):
    root, put = tree
    source = put("refimpl/a.py", "x = 1\n")
    digest = results.sha256(source)
    put("data/results/bench.json", {"command": "make bench", "date": "2026-01-02", "hardware": "2 cores",
                                    "sources": {"refimpl/a.py": digest}, "summary": "1.02 times"})
    assert "| current |" in status.page(systems.systems(), root)
    source.write_text("x = 2\n", encoding="utf-8")
    page = status.page(systems.systems(), root)
    assert "**stale**: `refimpl/a.py` changed" in page and 'datetime="2026-01-02"' in page


def test_time_and_memory_of_the_notebooks_are_shown_and_summed(tree):
    root, put = tree
    put("book/_static/runs.json", {"chapters/a.ipynb": {"seconds": 61.0, "peak_mb": 2048},
                                   "chapters/b.ipynb": {"seconds": 59.0, "peak_mb": 1024}})
    page = status.page(systems.systems(), root)
    assert "| `chapters/a.ipynb` | 61 s | 2.0 GB |" in page
    assert "| **all** | 2.0 min | 2.0 GB at most |" in page


def test_a_missed_gate_is_shown_as_missed_and_one_that_does_not_bind_as_a_dash(tree):
    root, put = tree
    put("refimpl/world/gates.toml", """
[[gate]]
name = "needle"
spec = "interp D3"
unit = "exact match"
is = "at least"
at = 0.95
level = "must"
[[gate]]
name = "judge"
spec = "alignment 7"
unit = "accuracy"
is = "at least"
at = { llama-mini = 0.75, gpt2-mini = 0.7 }
level = "should"
""")
    result = dict(value=0.9, lo=0.88, hi=0.92, n=1000)
    put("data/models/llama-mini/evaluation.json", {"gates": [{"name": "needle", "passed": True, **result},
                                                             {"name": "judge", "passed": False, **result}]})
    put("data/models/llama-nano/evaluation.json", {"gates": [{"name": "needle", "passed": None, **result}]})
    page = status.page(systems.systems(), root)
    assert "| at least 0.95 | interp D3 | ✓ 0.9 [0.88, 0.92] | – |" in page
    assert "0.75 (`llama-mini`), 0.7 (`gpt2-mini`) | alignment 7 | ✗ **missed** 0.9" in page
