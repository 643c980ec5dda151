"""Stored measurements: what they must say, and how a stale one is found."""

import json

import pytest

from refimpl import results


def put(folder, **changes):
    arguments = {"command": "make speed", "summary": "fast", "sources": ["a.py"], "speed": [1, 2]} | changes
    return results.store(folder / "results" / "speed.json", root=folder, **arguments)


def test_what_is_stored_is_what_the_status_page_reads(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    stored = put(tmp_path)
    assert json.loads((tmp_path / "results" / "speed.json").read_text()) == stored
    assert {"command", "date", "hardware", "versions", "sources", "summary", "speed"} == set(stored)
    assert {"python", "torch", "transformers"} == set(stored["versions"])
    assert results.changed_sources(stored, tmp_path) == []
    (tmp_path / "a.py").write_text("x = 2\n")
    assert results.changed_sources(stored, tmp_path) == ["a.py"]
    (tmp_path / "a.py").unlink()
    assert results.changed_sources(stored, tmp_path) == ["a.py"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"command": " "}, ValueError, "command must not be empty"),
        ({"summary": ""}, ValueError, "summary must not be empty"),
        ({"versions": {}}, ValueError, "versions are names of the file's head"),
        ({"sources": ["b.py"]}, FileNotFoundError, "b.py"),
        ({"speed": object()}, TypeError, "not JSON serializable"),
    ],
)
def test_a_bad_measurement_leaves_the_old_file(tmp_path, changes, error, words):
    (tmp_path / "a.py").write_text("")
    put(tmp_path)
    before = (tmp_path / "results" / "speed.json").read_bytes()
    with pytest.raises(error, match=words):
        put(tmp_path, **changes)
    assert (tmp_path / "results" / "speed.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["speed.json"]
