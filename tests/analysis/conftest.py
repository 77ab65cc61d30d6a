"""Fixtures shared by all tests of the analysis."""

import hashlib
import io
import math

import pytest
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from PIL import Image

from analysis import plots
from experiments.harness.runs import record
from tests.specs import twice  # noqa: F401, a fixture


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Skip fsync, which takes most of the time: a test's folders need not survive a power cut."""
    monkeypatch.setattr(record.os, "fsync", lambda descriptor: None)


@pytest.fixture
def sketches(monkeypatch):
    """Figures are drawn, but their files are hashes of what is in them: to lay out and render one takes seconds."""

    def files(name, figure):
        digest = hashlib.sha256(repr([*contents(figure)]).encode()).digest()
        picture = io.BytesIO()
        Image.frombytes("L", (8, 4), digest).save(picture, "png")
        return {f"{name}.pdf": digest, f"{name}.png": picture.getvalue()}

    monkeypatch.setattr(plots, "files", files)
    monkeypatch.setattr(plots, "FEW", math.inf)  # other processes would not know this function


def contents(figure: Figure):
    """The words, points, shapes and pixels of a figure."""
    for artist in figure.findobj():
        if isinstance(artist, Text):
            yield artist.get_text()
        elif isinstance(artist, Line2D):
            yield artist.get_xydata().tolist(), artist.get_linestyle(), artist.get_marker(), artist.get_color()
        elif isinstance(artist, Collection):
            yield artist.get_offsets().tolist(), [path.vertices.tolist() for path in artist.get_paths()]
        elif isinstance(artist, Patch):
            yield artist.get_path().vertices.tolist(), artist.get_patch_transform().get_matrix().tolist()
        elif isinstance(artist, AxesImage):
            yield artist.get_array().tolist()
