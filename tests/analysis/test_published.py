"""The rows published elsewhere: conversion, remarks and selection."""

import re

import pytest

from analysis.published import DISCLAIMER, FORET_NOTE, NEIGHBOURS, accuracy, lines, markdown, neighbours


@pytest.mark.parametrize(
    ("error", "expected"),
    [("3.5±0.1", "96.5±0.1"), ("2.1±<0.1", "97.9±<0.1"), ("16.5±0.2", "83.5±0.2"), ("4.30", "95.70")],
)
def test_error_becomes_accuracy_with_its_spread(error, expected):
    assert accuracy(error) == expected


def test_no_row_is_attributed_to_the_msam_paper():
    for row in NEIGHBOURS:
        assert not re.search(r"\bmSAM\b|2302\.09693|2212\.04343", f"{row.source} {row.setting} {row.other}")
        assert row.grade in ("A", "B")
        assert row.base or row.sam or row.other


def test_rows_come_with_the_remarks_on_them():
    rows = neighbours(["wrn-10-1"], ["cifar10"])
    assert {row.family for row in rows} == {"WRN"}
    assert {row.dataset for row in rows} == {"CIFAR-10"}
    for text in ("\n".join(lines(rows)), markdown(rows)):
        assert DISCLAIMER in text
        assert FORET_NOTE in text
    foret = next(line for line in lines(rows) if "basic augmentation, batch 256" in line)
    assert "base 96.5±0.1, SAM 97.3±0.1" in foret
    assert "printed as an error; shown as 100 minus the error" in foret
    assert "Foret et al. 2021, Table 1 (grade A)" in foret


def test_other_families_and_data_sets_are_left_out():
    assert neighbours(["linear"], ["cifar10"]) == []
    assert lines([]) == []
    text = neighbours(["minilm"], ["sst2", "snippets"])
    assert {row.dataset for row in text} == {"SST-2"}
    assert [(row.base, row.sam, row.other) for row in text] == [
        ("92.7±.1", "93.1±.6", ""),
        ("", "", "SAM over Adam -0.23±0.40"),
    ]
    assert {row.dataset for row in neighbours(["vit-micro"], ["cifar100"])} == {"CIFAR-100"}
    assert FORET_NOTE not in lines(neighbours(["resnet8"], ["cifar10"]))
