"""The site: `make docs` builds it from docs/, the committed results and the docstrings of msam, without a network."""

import re

from sphinx.application import Sphinx

import msam

project = "msam"
author = copyright = "the msam-reproduction authors"
version = release = msam.__version__

# The source folder is the repository, so that links between pages, results and code are those of a checkout.
root_doc = "docs/index"
include_patterns = ["docs/**", "msam/CHANGELOG.md", "results/cpu/tables/*.md", "benchmarks/results/*.md"]
exclude_patterns = ["docs/conf.py"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nitpicky = True
nitpick_ignore_regex = [("py:class", r"(torch|collections|msam\.graph|msam\.ways|msam\.as_loss)\..+")]  # in annotations
smartquotes = False
suppress_warnings = ["myst.header"]  # tables begin with a heading of the third level

html_theme = "furo"
html_title = f"msam {version}"
html_additional_pages = {"index": "to_first_page.html"}
templates_path, html_static_path, html_css_files = ["templates"], ["static"], ["wide.css"]
html_extra_path = ["../build/site-extra"]  # the wheel, put there by make docs
html_copy_source = html_show_sourcelink = False

myst_heading_anchors = 3
nb_execution_mode = "off"  # make notebook runs it; the page shows the outputs that are committed

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True


SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")


def escaped(line: str) -> str:
    """A line of Markdown in reStructuredText: `code` is literal, * and | are plain signs."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(f"`{part}`" if part[:1] == "`" else re.sub(r"([*|])", r"\\\1", part) for part in parts)


def markdown_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrite a docstring, whose marks are those of Markdown, in reStructuredText, in place.

    Indented blocks before the first section are formulas or programs.
    """
    shown: list[str] = []
    block, in_text = False, True
    for before, line in zip(["", *lines], lines, strict=False):
        in_text = in_text and not SECTION.fullmatch(line)
        if in_text and not block and not before and line.startswith("    "):
            block = True
            shown += [".. code-block:: text", ""]
        elif block and line and not line.startswith("    "):
            block = False
        shown.append(line if block else escaped(line))
    lines[:] = shown


def setup(app: Sphinx) -> None:
    """Rewrite docstrings before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", markdown_docstring, priority=400)
