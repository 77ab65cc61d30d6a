"""A table's text: digits, and escaping of text from records in every format."""

import pytest

from analysis.collect import collect
from analysis.document import latex_text, markdown_text, signed, three_digits
from analysis.frames import frame
from analysis.sentences import difference_in_words
from analysis.statistics import Interval
from tests.analysis.invented import document
from tests.fixtures import make_runs
from tests.fixtures.make_runs import CELLS, SAM, SGD, write_run


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(123.456, 7.89, 3), "123 ± 8 (3)"),
        (Interval(0.01234, 0.00056, 3), "0.0123 ± 0.0006 (3)"),
        (Interval(1.5, 20.0, 2), "1.5 ± 20.0 (2)"),
        (Interval(12.34, float("nan"), 1), "12.3 (1)"),
        (Interval(float("nan"), float("nan"), 0), "not run"),
    ],
)
def test_three_significant_digits(interval, text):
    assert three_digits(interval) == text


def test_a_difference_of_zero_has_no_minus():
    """The mean of differences that cancel may be -2e-17."""
    zero = Interval(-2e-17, 0.5, 8)
    assert three_digits(zero, signed=True) == "+0.000 ± 0.500 (8)"
    assert signed(zero) == "+0.00 ± 0.50 (8)"
    assert difference_in_words(zero, margin=1) == "+0.00 ± 0.50 (n=8): equivalent"


HOSTILE = r"| *a* _b_ `c` <script>&amp; [x](y) \input{z} $1 ~ # ^ % {q}"


def test_hostile_text_of_a_record_is_escaped(tmp_path):
    make_runs.record_of(SGD, tmp_path).create(SGD)
    make_runs.record_of(SGD, tmp_path).fail(HOSTILE + "\n\n# heading")
    write_run(tmp_path, SAM, 0.5, cpu=HOSTILE, commit="a|b")
    collected = collect(tmp_path)
    shown = document("table1", frame(collected.finished), CELLS, 1, collected.states)
    markdown, latex = shown.markdown(), shown.latex()
    escaped = r"\| \*a\* \_b\_ \`c\` \<script\>&amp;amp; \[x\](y) \\input\{z\} \$1 \~ # ^ % \{q\}"
    assert markdown.count(escaped) == 2
    assert "\n# heading" not in markdown
    assert "commit a\\|b" in markdown
    assert r"\textbackslash{}input\{z\} \$1 \textasciitilde{} \# \textasciicircum{} \% \{q\}" in latex
    assert r"\input" not in latex


def test_escapes_leave_plain_text_alone():
    text = "mSAM, m=4: +1.10 (n=3)"
    assert markdown_text(text) == latex_text(text) == text
