"""The parts of tools/build_pages.py: one module a kind of page."""

NOTICE = "<!-- Written by tools/build_pages.py; do not edit. -->\n"


def cell(text: str) -> str:
    """Make text safe inside one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Render a Markdown table; cells must already be safe."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
