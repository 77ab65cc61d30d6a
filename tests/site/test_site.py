"""The site that `make docs` has built: every link inside it leads to a file and a place, and nothing is missing."""

import inspect
import os
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import msam

pytestmark = pytest.mark.own_target

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
PAGES = [path for path in sorted(SITE.rglob("*.html")) if "_downloads" not in path.parts]


class Page(HTMLParser):
    """What a page links to, what it loads, and the places that links may name."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.places, self.words = [], [], {"", "top"}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.loads += [given[name] for name in ("src", "href") if name in given and tag in ("img", "script", "link")]

    def handle_data(self, data):
        self.words.append(data)


page = cache(Page)


def lost(path, link):
    """Why a link inside the site leads nowhere; None if it does, or goes elsewhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
    if not target.is_relative_to(SITE) or not target.is_file():
        return f"{link}: no such file"
    if target in PAGES and unquote(parts.fragment) not in page(target).places:
        return f"{link}: no such place"
    return None


def test_the_site_is_built():
    assert len(PAGES) > 30, "run make docs"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(SITE)))
def test_links_lead_somewhere(path):
    assert [why for link in (*page(path).links, *page(path).loads) if (why := lost(path, link))] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(SITE)))
def test_nothing_is_loaded_from_elsewhere(path):
    assert [link for link in page(path).loads if urlsplit(link).netloc] == []


def test_a_broken_link_is_noticed(tmp_path):
    first = SITE / "docs" / "index.html"
    assert lost(first, "nowhere.html") == "nowhere.html: no such file"
    assert lost(first, "api.html#nowhere") == "api.html#nowhere: no such place"
    assert lost(first, "api.html#msam.backward") is None
    assert lost(first, "../../../README.md"), "outside the site"


def test_every_page_of_docs_is_on_it():
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb"), ROOT / "msam" / "CHANGELOG.md"]
    for source in sources:
        assert (SITE / source.relative_to(ROOT)).with_suffix(".html").is_file(), source


@pytest.mark.parametrize("name", msam.__all__)
def test_the_reference_shows_every_public_name_and_parameter(name):
    shown = page(SITE / "docs" / "api.html")
    assert f"msam.{name}" in shown.places
    text = "".join(shown.words)
    documented = getattr(msam, name)
    assert inspect.getdoc(documented).split("\n")[0].replace("`", "").rstrip(":") in text.replace("\n", " ")
    if documented is not msam.Loss:  # which users get, and never make
        names = inspect.signature(documented).parameters
        assert [p for p in names if f"{p} –" not in text and f"{p}:" not in text] == []


def test_formulas_of_docstrings_are_shown_as_they_are_written():
    text = "".join(page(SITE / "docs" / "api.html").words)
    assert "e_i = rho * g_i / ||g_i||            its own perturbation" in text
    assert "e = rho * w^2 g / || |w| g ||" in text
    assert "`" not in text
