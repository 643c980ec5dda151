"""The contract of every stored notebook, read from the files: nothing is executed here (nbval does that)."""

import ast
import hashlib
import json
import re
from pathlib import Path

import nbformat
import pytest
import run_notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "chapters").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MAX_BYTES, MAX_SECONDS, MAX_MB = 500_000, 150, 3_000

INSTALLS = re.compile(r"(^|\s)[!%]?\s*(pip3?|conda|apt(-get)?)\s+install\b|^\s*!", re.MULTILINE)
MACHINE = re.compile(r"/(home|root|work|farm|tmp|Users)/|[A-Z]:\\\\Users|site-packages| at 0x[0-9a-f]{6,}")
TYPED_REFERENCE = re.compile(r"(?<!survey )(?<!survey's )\b(Figure|Table|Equation) \d")
MARKDOWN_IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<target>[^)\s]+)")
HTML_IMAGE = re.compile(r"<img\b[^>]*>", re.IGNORECASE)
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}


def problems(path: Path) -> list[str]:
    """Everything that is wrong with one notebook, in words."""
    text = path.read_text(encoding="utf-8")
    ids = [cell.get("id") for cell in json.loads(text)["cells"]]  # reading with nbformat would repair them
    if None in ids or len(set(ids)) < len(ids):
        return ["cell ids are missing or not unique"]
    try:
        nb = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        return [f"not a valid notebook: {error}"]
    found = []
    if len(text.encode()) > MAX_BYTES:
        found.append(f"{len(text.encode())} bytes, allowed are {MAX_BYTES}")
    if nb.metadata != run_notebooks.NOTEBOOK_METADATA:
        found.append("metadata is not the runner's (kernelspec with language, nothing else)")
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("execution counts are not 1, 2, 3, ...: not run from top to bottom in a new kernel")
    if code and not any(cell.outputs for cell in code):
        found.append("no outputs are stored")
    for i, cell in enumerate(nb.cells):
        cell_problems = _code(cell) if cell.cell_type == "code" else _prose(cell.source)
        found += [f"cell {i}: {problem}" for problem in cell_problems]
    return found


def _prose(source: str) -> list[str]:
    found = [f"typed reference {m.group()!r}" for m in TYPED_REFERENCE.finditer(source)]
    for match in MARKDOWN_IMAGE.finditer(source):
        found += _alt(match["alt"]) + _local(match["target"])
    for image in HTML_IMAGE.findall(source):
        found += _html_image(image)
    return found


def _code(cell) -> list[str]:
    found = []
    if INSTALLS.search(cell.source):
        found.append("installs or runs a shell command")
    if re.search(r"https?://", cell.source):
        found.append("code names a web address")
    found += _unseeded(cell.source)
    if "NBVAL_CHECK_OUTPUT" in cell.source and not cell.outputs:
        found.append("is to be compared, but has no output")
    if len([o for o in cell.outputs if "image/png" in o.get("data", {})]) > 1:
        found.append("more than one image in a cell")
    for output in cell.outputs:
        if output.output_type == "error":
            found.append(f"stores an error: {output.ename}")
        if output.output_type == "stream" and output.name == "stderr":
            found.append(f"stores stderr: {output.text[:80]!r}")
        data = output.get("data", {})
        shown = output.get("text", "") + "".join(v for k, v in data.items() if k.startswith("text/"))
        # pictures inside HTML are base64, in which any short string may occur
        shown = re.sub(r"base64,[A-Za-z0-9+/=]+", "", shown)
        if MACHINE.search(shown):
            found.append(f"output names this machine or an address: {MACHINE.search(shown).group()!r}")
        if "application/vnd.jupyter.widget-view+json" in data:
            found.append("stores a widget, which is dead without a kernel")
        if "image/png" in data:
            alt = output.metadata.get("image/png", {}).get("alt", "")
            found += _alt(alt)
            if "text/html" not in data and cell.metadata.get("mystnb", {}).get("image", {}).get("alt") != alt:
                found.append("alt text is not in the cell's metadata: run `make notebooks`")
        for image in HTML_IMAGE.findall(data.get("text/html", "")):
            found += _html_image(image)
    return found


def _unseeded(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ["is not plain Python"]
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name = ast.unparse(node.func)
        owner, _, function = name.rpartition(".")
        seeded = any(k.arg == "generator" for k in node.keywords)
        if (
            (owner == "torch" and function in DRAWS and not seeded)
            or (owner in {"np.random", "numpy.random"} and function not in {"default_rng", "Generator"})
            or (owner == "random" and function != "Random")
        ):
            found.append(f"draws from the global random state: {name}")
    return found


def _html_image(tag: str) -> list[str]:
    alt = re.search(r"\balt=(\"([^\"]*)\"|'([^']*)')", tag)
    source = re.search(r"\bsrc=[\"']?([^\"'\s>]+)", tag)
    return _alt((alt[2] or alt[3] or "") if alt else "") + _local(source[1] if source else "")


def _alt(alt: str) -> list[str]:
    bad = len(alt.strip()) < 10 or re.search(r"\.(png|svg|jpe?g)$", alt)
    return [f"image with poor alt text {alt!r}"] if bad else []


def _local(target: str) -> list[str]:
    return [f"image from the web: {target[:60]}"] if target.startswith(("http:", "https:", "//")) else []


def test_every_notebook_keeps_the_contract():
    found = [f"{path.relative_to(ROOT)}: {p}" for path in NOTEBOOKS for p in problems(path)]
    assert not found, "\n".join(found)


def test_every_notebook_is_as_the_runner_left_it_and_within_its_budget():
    runs = ROOT / run_notebooks.RUNS
    records = json.loads(runs.read_text(encoding="utf-8")) if runs.is_file() else {}
    found = []
    for path in NOTEBOOKS:
        name = path.relative_to(ROOT).as_posix()
        nb, record = nbformat.read(path, as_version=4), records.get(name)
        if record is None:
            found.append(f"{name}: has no entry in {run_notebooks.RUNS}: run `make notebooks`")
            continue
        if record["code"] != run_notebooks.code_hash(nb) or record["outputs"] != run_notebooks.outputs_hash(
            nb
        ):
            found.append(f"{name}: code or outputs were changed by hand: run `make notebooks`")
        if record["seconds"] > MAX_SECONDS or record["peak_mb"] > MAX_MB:
            found.append(f"{name}: {record['seconds']} s and {record['peak_mb']} MB are over the budget")
        for source in record["sources"]:
            if source.endswith(".safetensors"):
                model, file = Path(source).parent.name, ROOT / source
                if hashlib.sha256(file.read_bytes()).hexdigest() != record["models"][model]:
                    found.append(f"{name}: was run on another revision of {model}: run `make notebooks`")
    assert not found, "\n".join(found)


PNG = "iVBORw0KGgo="


def good_notebook():
    """A notebook that keeps the contract: a sentence, a printed line, a picture."""
    alt = "One line that rises from left to right."
    nb = nbformat.v4.new_notebook(metadata=run_notebooks.NOTEBOOK_METADATA)
    picture = nbformat.v4.new_output(
        "display_data", {"image/png": PNG, "text/plain": "<figure>"}, metadata={"image/png": {"alt": alt}}
    )
    nb.cells = [
        nbformat.v4.new_markdown_cell("The survey's Figure 1: ![a memory, drawn as a box](box.svg).", id="a"),
        nbformat.v4.new_code_cell(
            "print(1)", id="b", execution_count=1, outputs=[nbformat.v4.new_output("stream", text="1\n")]
        ),
        nbformat.v4.new_code_cell(
            "show(fig)",
            id="c",
            execution_count=2,
            outputs=[picture],
            metadata={"mystnb": {"image": {"alt": alt}}},
        ),
    ]
    return nb


def stored(nb, folder):
    path = folder / "n.ipynb"
    path.write_text(nbformat.writes(nb, version=nbformat.NO_CONVERT), encoding="utf-8")
    return path


def test_a_good_notebook_has_no_problems(tmp_path):
    assert problems(stored(good_notebook(), tmp_path)) == []


def stripped(nb):
    for cell in nb.cells[1:]:
        cell.outputs, cell.execution_count = [], None


def raised(nb):
    nb.cells[1].outputs = [nbformat.v4.new_output("error", ename="KeyError", evalue="'x'", traceback=[])]


def warned(nb):
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="UserWarning")]


def dead_widget(nb):
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
    nb.cells[1].outputs.append(nbformat.v4.new_output("display_data", data))


def html(tag):
    def spoil(nb):
        nb.cells[1].outputs.append(nbformat.v4.new_output("display_data", {"text/html": tag}))

    return spoil


def source(cell, text):
    return lambda nb: nb.cells[cell].update(source=text)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (stripped, "no outputs are stored"),
        (stripped, "execution counts"),
        (lambda nb: nb.cells[1].update(execution_count=7), "execution counts"),
        (raised, "stores an error: KeyError"),
        (warned, "stores stderr"),
        (dead_widget, "stores a widget"),
        (source(1, "!pip install refimpl"), "installs"),
        (source(1, "%pip install refimpl"), "installs"),
        (source(1, "open_url('https://example.org/data')"), "web address"),
        (source(1, "x = torch.randn(3)"), "global random state: torch.randn"),
        (source(1, "np.random.seed(0)"), "global random state: np.random.seed"),
        (source(1, "random.shuffle(x)"), "global random state: random.shuffle"),
        (source(0, "As Figure 3 shows"), "typed reference 'Figure 3'"),
        (source(0, "![](box.svg)"), "poor alt text"),
        (source(0, "![a memory, drawn](https://example.org/box.svg)"), "image from the web"),
        (html('<img src="x.png" alt="figure.png" />'), "poor alt text 'figure.png'"),
        (html("<p>saved in /Users/someone/x</p>"), "names this machine"),
        (html("<p>object at 0x7f1234567890</p>"), "names this machine or an address"),
        (lambda nb: nb.cells[2].metadata.clear(), "alt text is not in the cell's metadata"),
        (lambda nb: nb.cells[2].outputs[0].metadata.clear(), "poor alt text ''"),
        (lambda nb: nb.cells[2].outputs.append(nb.cells[2].outputs[0]), "more than one image"),
        (lambda nb: nb.metadata.kernelspec.pop("language"), "metadata is not the runner's"),
        (source(1, "x = 1 #" + "x" * MAX_BYTES), "bytes, allowed are 500000"),
    ],
)
def test_a_bad_notebook_is_refused(tmp_path, spoil, complaint):
    nb = good_notebook()
    spoil(nb)
    assert any(complaint in problem for problem in problems(stored(nb, tmp_path)))


def test_repeated_cell_ids_are_refused(tmp_path):
    path = stored(good_notebook(), tmp_path)
    path.write_text(path.read_text().replace('"id": "c"', '"id": "b"'), encoding="utf-8")
    assert problems(path) == ["cell ids are missing or not unique"]
