"""The built book, as a reader's browser gets it. Skipped until `make book` has built it."""
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

HTML = Path(os.environ.get("BOOK_HTML", Path(__file__).resolve().parents[2] / "_build" / "html"))
pytestmark = pytest.mark.skipif(not HTML.is_dir(), reason="the book is not built: run `make book`")

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src",
          "embed": "src", "object": "data", "image": "href", "use": "href"}
LOADING_LINKS = {"stylesheet", "preload", "modulepreload", "icon", "shortcut icon", "prefetch", "manifest"}
CODE = {"script", "style", "pre", "code", "textarea"}
RAW = re.compile(r"\$\$|\{(glue|cite|ref|numref|eq|doc|term|py)(:\w+)?\}`|^:{3,}|```", re.M)


class Page(HTMLParser):
    """What one page loads, links to and shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads, self.links, self.ids, self.images = [], [], set(), []
        self.prose, self.text, self._in_code = [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self._in_code += tag in CODE
        if found.get("id"):
            self.ids.add(found["id"])
        if tag == "a" and found.get("name"):
            self.ids.add(found["name"])
        if found.get(LOADED.get(tag, "")):
            self.loads.append(found[LOADED[tag]])
        if tag == "link" and found.get("rel", "").lower() in LOADING_LINKS:
            self.loads.append(found["href"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "img":
            self.images.append((found.get("src", ""), found.get("alt")))

    def handle_endtag(self, tag):
        self._in_code -= tag in CODE

    def handle_data(self, data):
        self.text.append(data)
        if not self._in_code:
            self.prose.append(data)


def pages() -> list[Path]:
    """Every page except the listings of source code, which may hold any characters."""
    return [path for path in sorted(HTML.rglob("*.html")) if not {"_static", "_modules"} & set(path.parts)]


@cache
def read(path: Path) -> Page:
    return Page(path)


def external(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme in ("http", "https", "ftp")


def test_the_pages_of_the_book_are_there():
    names = {path.relative_to(HTML).as_posix() for path in pages()}
    for name in ("intro", "how_to_use", "notation", "glossary", "errata", "bibliography", "api/index",
                 "_generated/systems", "_generated/claims", "_generated/status", "_generated/map"):
        assert f"book/{name}.html" in names, f"{name} is not in the built book"


def test_nothing_is_loaded_from_the_network():
    for path in pages():
        remote = [address for address in read(path).loads if external(address)]
        assert not remote, f"{path.relative_to(HTML)} loads {remote}"


def test_everything_loaded_is_in_the_folder():
    for path in pages():
        for address in read(path).loads:
            parts = urlsplit(address)
            if not parts.scheme and not external(address):
                file = path.parent / unquote(parts.path)
                assert file.is_file(), f"{path.relative_to(HTML)}: no {address}"


def test_every_image_has_a_text_that_describes_it():
    for path in pages():
        for source, alt in read(path).images:
            place = f"{path.relative_to(HTML)}: {source[:60]}"
            assert alt and alt.strip(), f"{place} has no alt text"
            assert not re.search(r"\.(png|svg|jpe?g|gif)$", alt), f"{place}: alt is a file name: {alt}"


def test_every_internal_link_leads_somewhere():
    for path in pages():
        for address in read(path).links:
            parts = urlsplit(address)
            if parts.scheme or external(address):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = f"{path.relative_to(HTML)}: {address}"
            assert target.is_file(), f"{place}: no such file"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in read(target).ids, f"{place}: no such place on the page"


def test_no_page_shows_a_traceback():
    """Outside the API, where an example may show an error on purpose."""
    for path in (path for path in pages() if "api" not in path.parts):
        text = "".join(read(path).text)
        assert "Traceback (most recent call last)" not in text, f"{path.relative_to(HTML)} shows a traceback"


def test_no_page_shows_raw_markup():
    for path in pages():
        found = RAW.search("".join(read(path).prose))
        assert not found, f"{path.relative_to(HTML)} shows raw markup: {found[0]!r}"


def test_formulas_are_typeset_by_the_vendored_script():
    notation = (HTML / "book" / "notation.html").read_text(encoding="utf-8")
    assert re.search(r'src="[^":]*vendor/mathjax/tex-mml-chtml\.js', notation)
    assert 'class="math' in notation
    assert list((HTML / "_static" / "vendor" / "mathjax").rglob("*.woff")), "MathJax's fonts are missing"
