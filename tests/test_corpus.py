"""Natural text: deterministic, de-duplicated, never imported."""

import hashlib
import inspect
import lzma
import platform
import sys

import pytest

from refimpl.corpus import docstrings, read_books, topics


def test_topics_are_split_once_and_completely():
    from pydoc_data.topics import topics as everything

    halves = topics("calibration"), topics("test")
    names = [name for half in halves for name in half.names]
    assert sorted(names) == sorted(everything) and len(set(names)) == len(names)
    assert min(half.n_bytes for half in halves) > 0.3 * sum(half.n_bytes for half in halves)
    for half in halves:
        assert half.python == platform.python_version()
        assert half.sha256 == hashlib.sha256("\0".join(half.documents).encode()).hexdigest()
        assert all(hashlib.sha256(n.encode()).digest()[0] % 2 == (half is halves[1]) for n in half.names)
    assert halves[0].sha256 != halves[1].sha256 == topics("test").sha256
    with pytest.raises(ValueError, match="split must be one of calibration, test, got 'train'"):
        topics("train")


SOURCE = '''"""Module text.

Shared paragraph.
"""
import does_not_exist_anywhere
raise SystemExit("importing this module ends the process")

class Thing:
    """Class text."""

    async def late(self):
        """Method text with <|user|> in it.

        Kept   paragraph.
        """

def early():
    """Shared
    paragraph."""

def silent():
    return "no docstring"
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "a_package_of_the_test"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text(SOURCE)
    (folder / "inner" / "b.py").write_text('"""Class text.\n\nOnly here: é."""\n')
    (folder / "inner" / "broken.py").write_text("def (:\n")
    (folder / "zero.py").write_bytes(b"'''x'''\0")
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


def test_docstrings_come_in_source_order_each_paragraph_once(package):
    text = docstrings([package])
    assert text.names == (f"{package}/__init__.py", f"{package}/inner/b.py")
    first = "Module text.\n\nShared paragraph.\n\nClass text.\n\nKept   paragraph.\n"
    assert text.documents == (first, "Only here: é.\n")
    assert text.unreadable == (f"{package}/inner/broken.py", f"{package}/zero.py")
    assert text.dropped == 3  # the mark, and two repeated paragraphs
    assert package not in sys.modules and text == docstrings([package])
    assert "Method text with <|user|> in it." in docstrings([package], exclude=()).documents[0]


def test_a_limit_stops_before_the_file_that_exceeds_it(package):
    both = docstrings([package])
    assert docstrings([package], max_bytes=both.n_bytes).documents == both.documents
    assert docstrings([package], max_bytes=both.n_bytes - 1).documents == both.documents[:1]
    with pytest.raises(ValueError, match="max_bytes"):
        docstrings([package], max_bytes=0)


def test_docstrings_of_a_module_are_those_that_help_shows():
    import textwrap

    text = docstrings(["textwrap"])
    assert text.names == ("textwrap.py",)
    for thing in (textwrap, textwrap.TextWrapper, textwrap.TextWrapper.wrap, textwrap.dedent):
        for paragraph in inspect.getdoc(thing).split("\n\n"):
            assert paragraph in text.documents[0]


def test_the_environment_is_read_by_name_when_no_package_is_given():
    text = docstrings(max_bytes=60_000)
    assert 0 < text.n_bytes <= 60_000
    tops = [name.split("/")[0].removesuffix(".py") for name in text.names]
    assert tops == sorted(tops)


def test_packages_that_are_not_there_are_refused(package):
    for name in ("no_such_package_here", "json.decoder", "sys", "_bisect"):
        with pytest.raises(ValueError, match=name):
            docstrings([name])


def test_books_are_split_and_read_from_files_and_folders(tmp_path):
    one, two = tmp_path / "b.txt", tmp_path / "a.txt.xz"
    one.write_text("Drei Bücher.\n<|endoftext|>\nSecond.\r\n<|endoftext|>\n", encoding="utf-8", newline="")
    two.write_bytes(lzma.compress(b"Packed."))
    (tmp_path / "notes.md").write_text("not a book")
    assert read_books(one) == ["Drei Bücher.", "Second."]
    assert read_books(str(two)) == ["Packed."]
    assert read_books(tmp_path) == ["Packed.", "Drei Bücher.", "Second."]


def test_what_is_not_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_books(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="no .txt"):
        read_books(tmp_path)
    for name, data, message in [
        ("a.pdf", b"x", "must be a .txt"),
        ("b.txt", b" \n", "holds no text"),
        ("c.txt", b"caf\xe9", "not UTF-8"),
        ("d.txt.xz", b"no archive", "not UTF-8 text"),
        ("e.txt.xz", lzma.compress(b"word " * 100)[:-20], "not UTF-8 text"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_books(tmp_path / name)
