"""Natural text that needs no download: pydoc's topics, docstrings of installed packages, folders of books.

- `topics`: the chapters of Python's language reference that pydoc carries; held out from pretraining, split
  by hash into a calibration and a test half. Their text differs between Python versions, so every number
  computed from them is stored with the version and the hash that come with the text.
- `docstrings`: read from the sources with `ast`; no package is imported.
- `read_books`: plain text, one file or a folder.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import lzma
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

__all__ = ["Docstrings", "Split", "Text", "docstrings", "read_books", "topics"]

Split = Literal["calibration", "test"]
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Text:
    """Documents with what is needed to say which text a number came from.

    Parameters
    ----------
    names : one per document.
    documents : the texts.
    python : version of the Python that supplied or read them.
    """

    names: tuple[str, ...]
    documents: tuple[str, ...]
    python: str

    @property
    def sha256(self) -> str:
        """SHA-256 over the documents in their order, separated by a zero byte."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(document.encode()) for document in self.documents)


@dataclass(frozen=True)
class Docstrings(Text):
    """Docstrings as text, one document per source file.

    Parameters
    ----------
    unreadable : files that are not valid Python of this version (templates, test data), left out.
    dropped : paragraphs left out because an earlier file has them or they hold an excluded mark.
    """

    unreadable: tuple[str, ...]
    dropped: int


def topics(split: Split) -> Text:
    """Return one half of pydoc's topics (language reference, about 0.45 MB of reStructuredText in all).

    The half a topic belongs to depends on its name alone, so it is the same in every Python.

    Parameters
    ----------
    split : "calibration" (statistics, calibration of compressors) or "test" (reported numbers).

    Raises ValueError for another split.

    Examples
    --------
    >>> test, calibration = topics("test"), topics("calibration")
    >>> set(test.names) & set(calibration.names)
    set()
    >>> "lambda" in test.names + calibration.names
    True
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    from pydoc_data.topics import topics as all_topics

    half = get_args(Split).index(split)
    names = tuple(name for name in sorted(all_topics) if _half(name) == half)
    return Text(names, tuple(all_topics[name].strip() + "\n" for name in names), platform.python_version())


def _half(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] % 2


def docstrings(
    packages: Sequence[str] | None = None,
    *,
    max_bytes: int | None = None,
    exclude: Iterable[str] = ("<|",),
) -> Docstrings:
    """Collect the docstrings of installed packages, each paragraph once, without importing anything.

    A document is one source file: its module, class and function docstrings in the order of the source. Files
    are read package by package as given (all of the environment: by name), within a package by path.

    Parameters
    ----------
    packages : top-level names; default every package and module of the environment and the standard library.
    max_bytes : stop before the file that would exceed this many UTF-8 bytes; default no limit.
    exclude : paragraphs with one of these strings are dropped; by default the opening of special tokens,
        which would be read as tokens rather than text.

    Raises ValueError for a package that is not installed as Python source, and for a limit below 1.

    Examples
    --------
    >>> text = docstrings(["json"])
    >>> text.names[0]
    'json/__init__.py'
    >>> text.documents[0].startswith("JSON (JavaScript Object Notation)")
    True
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    marks = tuple(exclude)
    roots = _installed() if packages is None else [(name, _locate(name)) for name in packages]
    names, documents, unreadable = [], [], []
    seen: set[bytes] = set()
    size = dropped = 0
    for path, name in _sources(roots):
        try:
            found = _docstrings_of(path.read_bytes())
        except (SyntaxError, ValueError):  # ValueError: a zero byte in the source
            unreadable.append(name)
            continue
        kept, fresh = [], set()
        for text in found:
            paragraphs = [p for p in (p.strip("\n") for p in text.split("\n\n")) if p.strip()]
            new = []
            for paragraph in paragraphs:
                digest = hashlib.sha256(" ".join(paragraph.split()).encode("utf-8", "replace")).digest()
                if digest in seen or digest in fresh or any(mark in paragraph for mark in marks):
                    dropped += 1
                else:
                    fresh.add(digest)
                    new.append(paragraph)
            if new:
                kept.append("\n\n".join(new))
        if not kept:
            continue
        document = "\n\n".join(kept).encode("utf-8", "replace").decode() + "\n"
        n_bytes = len(document.encode())
        if max_bytes is not None and size + n_bytes > max_bytes:
            break
        size += n_bytes
        seen |= fresh
        names.append(name)
        documents.append(document)
    return Docstrings(tuple(names), tuple(documents), platform.python_version(), tuple(unreadable), dropped)


def _docstrings_of(source: bytes) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, holders)]
    nodes.sort(key=lambda node: 0 if isinstance(node, ast.Module) else node.lineno)
    return [text for text in map(ast.get_docstring, nodes) if text]


def _installed() -> list[tuple[str, Path]]:
    """Return (name, path) of every importable top-level package or module that is Python source."""
    found: dict[str, Path] = {}
    for key in ("stdlib", "purelib", "platlib"):
        for path in sorted(Path(sysconfig.get_paths()[key]).iterdir()):
            if path.is_dir() and path.name.isidentifier() and path.name != "__pycache__":
                found.setdefault(path.name, path)
            elif path.suffix == ".py" and path.stem.isidentifier():
                found.setdefault(path.stem, path)
    return sorted(found.items())


def _locate(name: str) -> Path:
    if not name.isidentifier():
        raise ValueError(f"packages must be top-level names, got {name!r}")
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"package {name!r} is not installed as Python source")
    return Path(spec.origin)


def _sources(roots: Iterable[tuple[str, Path]]) -> Iterator[tuple[Path, str]]:
    """Yield (path, name such as "json/decoder.py") of every source file below the roots."""
    for _, root in roots:
        files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
        for path in files:
            yield path, path.relative_to(root.parent).as_posix()


def read_books(path: str | Path) -> list[str]:
    """Read books from a `.txt` or `.txt.xz` file, or from every such file of a folder, by name.

    A file is split at `<|endoftext|>`; white space around a book is removed. Raises
    FileNotFoundError for a missing path, and ValueError for another kind of file, a folder without text, an
    empty file, and text that is not UTF-8, naming the file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "two.txt").write_text("First book.<|endoftext|>Second book.")
    ...     read_books(folder)
    ['First book.', 'Second book.']
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith((".txt", ".txt.xz")))
        if not files:
            raise ValueError(f"folder {path} holds no .txt or .txt.xz file")
    else:
        files = [path]
    books = []
    for file in files:
        found = [book for book in (book.strip() for book in _read_text(file).split(SEPARATOR)) if book]
        if not found:
            raise ValueError(f"{file} holds no text")
        books += found
    return books


def _read_text(file: Path) -> str:
    if not file.name.endswith((".txt", ".txt.xz")):
        raise ValueError(f"{file} must be a .txt or .txt.xz file")
    data = file.read_bytes()
    try:
        if file.suffix == ".xz":
            data = lzma.decompress(data)
        return data.decode("utf-8-sig")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
