"""The notebook runner, on small notebooks in a folder of their own."""

import json

import nbformat
import pytest
import run_notebooks as runner

FIGURE = """
from matplotlib.figure import Figure
from refimpl.viz import show
fig = Figure(figsize=(1, 1))
fig.subplots().plot([0, 1])
show(fig, alt="One line that rises from left to right.")
"""


@pytest.fixture
def book(tmp_path):
    """A folder with one chapter, one module of a package named refimpl and one data file."""
    for folder in ("chapters/00", "refimpl", "data/world"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/world/facts.json").write_text("[1, 2]")
    return tmp_path


def write(book, *cells, metadata=None):
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nb.metadata = nbformat.from_dict(metadata or {})
    path = book / "chapters/00/a.ipynb"
    nbformat.write(nb, path)
    return path


def run(book, *arguments):
    return runner.main([*arguments, "--jobs", "1"], root=book)


def records(book):
    return json.loads((book / runner.RUNS).read_text())["chapters/00/a.ipynb"]


def test_a_run_stores_outputs_alt_text_plain_metadata_and_what_it_took(book):
    path = write(
        book,
        FIGURE,
        "print('a'); print('b')",
        "import os; [os.environ[k] for k in ('OMP_NUM_THREADS', 'HF_HUB_OFFLINE', 'PYTHONHASHSEED')]",
        metadata={"widgets": {"x": 1}, "kernelspec": {"name": "other", "display_name": "other"}},
    )
    assert run(book) == 0
    nb = nbformat.read(path, as_version=4)
    assert nb.metadata == runner.NOTEBOOK_METADATA
    assert [c.execution_count for c in nb.cells] == [1, 2, 3]
    assert nb.cells[0].metadata["mystnb"]["image"]["alt"] == "One line that rises from left to right."
    assert len(nb.cells[1].outputs) == 1 and nb.cells[1].outputs[0].text == "a\nb\n"
    assert nb.cells[2].outputs[0].data["text/plain"] == "['1', '1', '0']"
    assert records(book)["seconds"] > 0 and 20 < records(book)["peak_mb"] < 3000


def test_a_notebook_is_left_untouched_until_code_data_or_outputs_change(book):
    path = write(book, "from pathlib import Path\nprint(Path('../../data/world/facts.json').read_text())")
    assert run(book) == 0
    assert records(book)["sources"] == ["data/world/facts.json"]
    first, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert run(book) == 0 and run(book, "--check") == 0
    assert path.stat().st_mtime_ns == stamp
    assert run(book, "--force", str(path)) == 0  # the same outputs again: the file is not rewritten
    assert path.stat().st_mtime_ns == stamp and path.read_bytes() == first

    (book / "data/world/facts.json").write_text("[3]")
    assert run(book, "--check") == 1
    assert run(book) == 0
    assert "[3]" in nbformat.read(path, as_version=4).cells[0].outputs[0].text

    nb = nbformat.read(path, as_version=4)
    nb.cells[0].outputs[0].text = "an embellished number\n"
    nbformat.write(nb, path)
    assert run(book, "--check") == 1


def test_a_change_in_an_imported_module_makes_the_notebook_run_again(book):
    module = book / "refimpl/__init__.py"
    module.write_text("VALUE = 1\n")
    path = write(book, "import sys; sys.path.insert(0, '../..')\nimport refimpl\nprint(refimpl.VALUE)")
    assert run(book) == 0
    assert records(book)["sources"] == ["refimpl/__init__.py"]
    module.write_text("VALUE = 23\n")
    assert run(book) == 0
    assert nbformat.read(path, as_version=4).cells[0].outputs[0].text == "23\n"


def test_editing_prose_tidies_metadata_without_a_run(book):
    path = write(book, "print(1)")
    assert run(book) == 0
    before = records(book)
    nb = nbformat.read(path, as_version=4)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("A new sentence."))
    nb.cells[1].metadata["collapsed"] = True
    nb.metadata["language_info"]["version"] = "3.11.4"
    nbformat.write(nb, path)
    assert run(book) == 0
    assert nbformat.read(path, as_version=4).metadata == runner.NOTEBOOK_METADATA
    assert records(book) == before


@pytest.mark.parametrize(
    "cells, complaint",
    [
        (["1 / 0"], "ZeroDivisionError"),
        (["from matplotlib import pyplot as plt\nplt.plot([1]); plt.show()"], "without alt text"),
        ([FIGURE + FIGURE], "one per cell"),
    ],
)
def test_a_notebook_that_raises_or_shows_a_figure_without_alt_is_not_written(book, capsys, cells, complaint):
    path = write(book, *cells)
    before = path.read_bytes()
    assert run(book) == 1
    assert path.read_bytes() == before and not (book / runner.RUNS).exists()
    assert complaint in capsys.readouterr().out


def test_a_missing_notebook_is_named(book, capsys):
    with pytest.raises(SystemExit):
        run(book, str(book / "chapters/none.ipynb"))
    assert "none.ipynb" in capsys.readouterr().err
