"""Figures that everyone can see, in both themes, in print and without a network."""

import base64
import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from refimpl import viz
from refimpl.systems import VERDICTS

ALT = "A single line that rises from left to right."


@pytest.fixture(autouse=True)
def house_style():
    with matplotlib.rc_context():
        matplotlib.use("Agg")
        viz.use_style()
        yield
    plt.close("all")


def line(height=1.0, size=(2, 1)):
    fig = Figure(figsize=size)
    fig.subplots().plot([0, height])
    return fig


# ---- palette ---------------------------------------------------------------------------------------------

# Machado, Oliveira, Fernandes (2009), severity 1: linear RGB as a dichromat sees it
DICHROMATS = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                   [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip


def linear_rgb(colour):
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", DICHROMATS)
def test_any_two_colours_of_the_palette_are_told_apart_by(eye):
    seen = {name: lab(np.array(DICHROMATS[eye]) @ linear_rgb(c)) for name, c in viz.PALETTE.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 15, f"{a} and {b} look alike to a {eye} eye"


def test_every_colour_of_the_palette_stands_out_from_white():
    for name, colour in viz.PALETTE.items():
        contrast = 1.05 / (TO_XYZ[1] @ linear_rgb(colour) + 0.05)
        assert contrast >= 3, f"{name} has a contrast of {contrast:.2f} on white"


def test_lines_take_the_palette_in_order_and_the_background_is_opaque_white():
    fig, ax = plt.subplots()
    assert [ax.plot([0, 1])[0].get_color() for _ in viz.PALETTE] == list(viz.PALETTE.values())
    image = Image.open(io.BytesIO(viz._png(fig))).convert("RGBA")
    assert image.getpixel((0, 0)) == (255, 255, 255, 255)
    assert image.getextrema()[3] == (255, 255)


# ---- show ------------------------------------------------------------------------------------------------


def test_show_hands_over_png_and_alt_and_closes_the_figure(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1])
    viz.show(fig, alt=ALT)
    data, metadata = shown[0]._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert metadata == {"image/png": {"alt": ALT}}
    assert plt.get_fignums() == []


def test_the_same_drawing_gives_the_same_bytes():
    assert viz._png(line()) == viz._png(line())
    assert viz._png(line(1.0)) != viz._png(line(-1.0))


@pytest.mark.parametrize(
    "fig, alt, error, message",
    [
        ("no figure", ALT, TypeError, "fig must be a matplotlib Figure, got str"),
        (Figure(), None, TypeError, "alt must be a string, got NoneType"),
        (Figure(), "a plot", ValueError, "20 or more characters"),
        (Figure(), "attention_of_layer_three.png", ValueError, "file name"),
    ],
)
def test_show_refuses(fig, alt, error, message):
    with pytest.raises(error, match=re.escape(message)):
        viz.show(fig, alt)


# ---- frames ----------------------------------------------------------------------------------------------


def three_frames(label="height", alt=ALT):
    return viz.frames(line, settings=[1, 2, 3], label=label, alt=alt)


def test_frames_is_well_formed_self_contained_and_has_an_alt_for_each_setting():
    markup = three_frames()._repr_html_()
    root = ElementTree.fromstring(markup)  # XHTML: what an EPUB page must be
    assert not re.search(r"https?:|src=\"(?!data:image/png;base64,)|\bimport\b|\bfetch\b", markup)
    assert root.find("img").get("alt") == f"{ALT} (height: 1)"
    assert root.find("label/input").get("max") == "2"
    data = json.loads(re.search(r"data = (\{.*?\});", root.find("script").text)[1])
    assert data["at"] == ["1", "2", "3"]
    assert data["alt"] == [f"{ALT} (height: {k})" for k in (1, 2, 3)]
    assert len(set(data["src"])) == 3
    for src in data["src"]:
        Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).verify()


def test_without_scripts_the_first_frame_shows_and_the_slider_does_not():
    root = ElementTree.fromstring(three_frames()._repr_html_())
    assert root.find("img").get("src").startswith("data:image/png;base64,")
    assert "display:none" in root.find("label").get("style")
    data, metadata = three_frames()._repr_mimebundle_()
    assert "data:image/png;base64," + data["image/png"] == root.find("img").get("src")
    assert metadata["image/png"]["alt"] == f"{ALT} (height: 1)"


def test_every_display_has_its_own_id_also_of_one_object():
    a, b = three_frames(), three_frames()
    ids = [ElementTree.fromstring(x._repr_html_()).get("id") for x in (a, b, a)]
    assert len(set(ids)) == 3
    markup = a._repr_html_()
    uid = ElementTree.fromstring(markup).get("id")
    assert markup.count(uid) == 4  # the figure, its two rules for print, its script


def test_labels_and_alts_cannot_break_out_of_the_markup():
    nasty = 'a </script> & "quoted" <b> label that is long'
    root = ElementTree.fromstring(three_frames(label=nasty, alt=nasty)._repr_html_())
    assert root.find("img").get("alt") == f"{nasty} ({nasty}: 1)"
    assert "<" not in root.find("script").text and "&" not in root.find("script").text


def test_frames_takes_figures_as_well_as_a_function():
    made = viz.frames([line(1), line(2)], settings=[1, 2], label="height", alt=ALT)
    called = viz.frames(line, settings=[1, 2], label="height", alt=ALT)
    assert made.pngs == called.pngs


def noise(seed):
    fig = Figure(figsize=(6, 4))
    fig.subplots().imshow(np.random.default_rng(seed).random((300, 400)), interpolation="nearest")
    return fig


@pytest.mark.parametrize(
    "change, message",
    [
        ({"settings": [1]}, "2 to 24 values, got 1"),
        ({"settings": range(25)}, "2 to 24 values, got 25"),
        ({"label": " "}, "label must be a non-empty string"),
        ({"alt": "short"}, "20 or more characters"),
        ({"figures": [line()]}, "equal number, got 1 and 3"),
        ({"figures": lambda k: line(size=(2, k))}, "one size in pixels"),
        ({"figures": noise}, "allowed are 250000"),
    ],
)
def test_frames_refuses(change, message):
    arguments = {"figures": line, "settings": [1, 2, 3], "label": "height", "alt": ALT} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        viz.frames(**arguments)


def test_frames_refuses_what_is_no_figure():
    with pytest.raises(TypeError, match="the figure of height = 1 must be a matplotlib Figure, got NoneType"):
        viz.frames(lambda k: None, settings=[1, 2], label="height", alt=ALT)


# ---- tables and sources ----------------------------------------------------------------------------------

ROW = {"claim": "H2O loses < 1 %", "scale": "10 M", "measured": "0.4 %", "verdict": "reproduced"}


def test_claims_table_shows_every_row_escaped_under_the_four_headings():
    rows = [ROW | {"verdict": verdict} for verdict in VERDICTS]
    root = ElementTree.fromstring(viz.claims_table(rows)._repr_html_())
    assert [th.text for th in root.iter("th")] == ["paper's claim", "our scale", "measured", "verdict"]
    assert [strong.text for strong in root.iter("strong")] == list(VERDICTS)
    assert root.find("tbody/tr/td").text == ROW["claim"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "at least one claim"),
        ([{"claim": "x"}], "rows[0] must have the keys"),
        ([ROW | {"note": "x"}], "rows[0] must have the keys"),
        ([ROW, ROW | {"measured": ""}], "rows[1]['measured'] must be a non-empty string"),
        ([ROW | {"verdict": "true"}], "rows[0]['verdict'] is 'true', allowed are"),
    ],
)
def test_claims_table_refuses(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        viz.claims_table(rows)


def test_show_source_prints_the_code_that_runs_as_a_python_block():
    block = viz.show_source(viz.Frames)._repr_markdown_()
    assert block.startswith("``````python\n# refimpl.viz.Frames\nclass Frames:")
    assert block.endswith("\n``````") and "def alts(self)" in block
    assert "# refimpl.viz\n" in viz.show_source(viz)._repr_markdown_()
    with pytest.raises(TypeError):
        viz.show_source(3)
