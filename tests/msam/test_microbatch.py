"""Splitting: near-equal, disjoint, in order, whatever the structure."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import msam


@given(examples=st.integers(1, 40), m=st.integers(1, 50))
def test_sizes_differ_by_one_and_nothing_is_lost(examples, m):
    batch = torch.arange(examples)
    parts = msam.split(batch, m)
    sizes = [len(part) for part in parts]
    assert len(parts) == min(m, examples)
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat(parts), batch)


Pair = namedtuple("Pair", "x y")


@dataclass
class Text:
    ids: torch.Tensor
    names: list


def test_structures_are_kept():
    x = torch.arange(10).reshape(5, 2)
    batch = {"a": [x, (x + 1, None)], "b": Pair(x, {"c": x}), "d": OrderedDict(k=x), "e": "text"}
    first, second = msam.split(batch, 2)
    assert type(first["a"]) is list
    assert type(first["a"][1]) is tuple
    assert isinstance(first["b"], Pair)
    assert type(first["d"]) is OrderedDict
    assert first["e"] == "text"
    assert first["a"][1][1] is None
    assert torch.equal(first["b"].y["c"], x[:3])
    assert torch.equal(second["d"]["k"], x[3:])


def test_dataclasses():
    parts = msam.split(Text(torch.arange(4), ["any"]), 2)
    assert [part.ids.tolist() for part in parts] == [[0, 1], [2, 3]]
    assert parts[1].names == ["any"]


def test_parts_are_views():
    batch = torch.zeros(4)
    msam.split(batch, 2)[1].fill_(1)
    assert batch.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"a": "text"}, "no tensor"),
        ([torch.zeros(3), torch.zeros(4)], "share their first dimension"),
        ([torch.zeros(3), torch.tensor(1.0)], "share their first dimension"),
        (torch.zeros(0, 2), "no example"),
    ],
)
def test_refuses_what_cannot_be_split(batch, words):
    with pytest.raises(ValueError, match=words):
        msam.split(batch, 2)
