"""Splitting: near-equal, disjoint, in order, whatever the structure."""

from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree

import msam
from tests.msam.small import data, gradients, loss_of, mlp


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


WORDS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg"]
BY_EXAMPLE = {
    "list": WORDS,
    "tuple": tuple(WORDS),
    "deque": deque(WORDS),
    "range": range(7),
    "numbers": [0.5 * i for i in range(7)],
    "array": numpy.arange(14).reshape(7, 2),
    "array of words": numpy.array(WORDS),
    "lists of tokens": [list(range(i)) for i in range(1, 8)],
    "lists of as many tokens": [list(range(5)) for _ in range(7)],
    "list of dicts": [{"n": i} for i in range(7)],
    "list of arrays": [numpy.zeros(i) for i in range(1, 8)],
}


@pytest.mark.parametrize("kind", BY_EXAMPLE)
def test_what_has_an_entry_for_each_example_is_split_like_a_tensor(kind):
    value = BY_EXAMPLE[kind]
    parts = split_by_example(value)
    assert [str(entry) for part in parts for entry in part] == [str(entry) for entry in value]


def split_by_example(value):
    parts = [part["other"] for part in msam.split({"x": torch.arange(7), "other": value}, 3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert all(type(part) is type(value) for part in parts)
    return parts


@pytest.mark.needs("pandas")
def test_tables_and_columns_are_split_by_row():
    import pandas

    table = pandas.DataFrame({"a": range(7)})
    for value in (table, table["a"]):
        assert pandas.concat(split_by_example(value)).equals(value)


def test_columns_of_a_collated_batch_are_split_each():
    """default_collate makes a list of columns from pairs of strings."""
    columns = [("a", "b", "c"), ("d", "e", "f")]
    first, second = msam.split({"x": torch.arange(3), "pair": columns}, 2)
    assert first["pair"] == [("a", "b"), ("d", "e")]
    assert second["pair"] == [("c",), ("f",)]


@pytest.mark.parametrize("value", ["text", None, 3, 2.5, ["one", "two"], (), {"k": 1}, {"a", "b"}, numpy.zeros(3)])
def test_anything_else_goes_to_every_micro_batch(value):
    for part in msam.split({"x": torch.arange(7), "other": value}, 3):
        assert str(part["other"]) == str(value)


@pytest.mark.parametrize("examples", [2, 3])
def test_a_container_of_tensors_stays_one(examples):
    x, y = torch.arange(2 * examples).view(examples, 2), torch.arange(examples)
    parts = msam.split([x, y], 2)
    assert all(len(part) == 2 for part in parts)
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)


def test_lists_of_tensors_of_other_shapes_are_split_by_entry():
    """Images and their boxes, as detection has them; and a list of samples."""
    images = [torch.zeros(3, 4 + i, 5) for i in range(4)]
    boxes = [{"boxes": torch.zeros(i, 4), "labels": torch.zeros(i)} for i in range(4)]
    parts = msam.split((images, boxes), 2)
    assert [len(part[0]) for part in parts] == [2, 2]
    assert parts[1][1][0] is boxes[2]
    samples = [(torch.zeros(3), torch.tensor(1.0)) for _ in range(4)]
    assert [len(part) for part in msam.split(samples, 2)] == [2, 2]


class Graph:
    """What a library of graphs batches, and this one knows nothing about."""

    def __init__(self):
        self.nodes = torch.zeros(8, 2)


class Held:
    def __init__(self, x, note):
        self.x, self.note = x, note


_pytree.register_pytree_node(Held, lambda held: ([held.x], held.note), lambda pieces, note: Held(*pieces, note))


def test_registered_classes_are_split_and_rebuilt():
    parts = msam.split((Held(torch.arange(4), "n"), torch.arange(4)), 2)
    assert [part[0].x.tolist() for part in parts] == [[0, 1], [2, 3]]
    assert parts[0][0].note == "n"


class Indexed:
    """As a TensorDict is: a batch size, and slices."""

    def __init__(self, x):
        self.x = x

    @property
    def batch_size(self):
        return torch.Size([len(self.x)])

    def __getitem__(self, index):
        return Indexed(self.x[index])


def test_what_has_a_batch_size_is_indexed():
    parts = msam.split({"td": Indexed(torch.arange(5)), "y": torch.arange(5)}, 2)
    assert [part["td"].x.tolist() for part in parts] == [[0, 1, 2], [3, 4]]


def test_dicts_keep_their_class():
    batch = defaultdict(list, x=torch.arange(4))
    first, _ = msam.split(batch, 2)
    assert type(first) is defaultdict
    assert first["missing"] == []


OPEN = {
    "two ways": ({"x": torch.arange(3), "a": [["a", "b", "c"]] * 3}, "could be split by either"),
    "two ways of arrays": ({"x": torch.arange(3), "a": [numpy.zeros(3)] * 3}, "could be split by either"),
    "a set": ({"x": torch.arange(2), "a": {"a", "b"}}, "no order"),
    "an iterator": ({"x": torch.arange(2), "a": iter("ab")}, "make a list"),
    "an object with tensors": ((Graph(), torch.arange(2)), "register_pytree_node.*ready micro-batches"),
    "packed sequences": (pack_sequence([torch.zeros(3), torch.zeros(2)]), "PackedSequence.*ready micro-batches"),
    "jagged": (
        torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged),
        "ready micro-batches",
    ),
    "two tasks": ([(torch.zeros(4, 2), torch.zeros(4)), (torch.zeros(3, 2), torch.zeros(3))], "share their first"),
}


@pytest.mark.parametrize("kind", OPEN)
def test_what_is_open_is_refused(kind):
    batch, words = OPEN[kind]
    with pytest.raises(ValueError, match=words):
        msam.split(batch, 2)


@pytest.mark.parametrize("kind", sorted(OPEN.keys() - {"an iterator"}))
def test_one_micro_batch_takes_any_batch(kind):
    batch, _ = OPEN[kind]
    model, (x, y) = mlp(), data(4, 5)
    seen = []

    def loss_fn(part):
        seen.append(part)
        return loss_of(model)((x, y))

    msam.backward(loss_fn, batch, model, rho=0.1)
    assert len(seen) == 2
    assert type(seen[0]) is type(batch)


def test_ready_lists_of_images_weigh_by_images():
    model, x = mlp(), data(8, 5)[0]
    parts = [[torch.zeros(3, 4, 4)] * 3, [torch.zeros(3, 5, 5)]]
    seen = iter([x[:3], x[:3], x[3:4], x[3:4]])
    msam.backward(lambda part: model(next(seen)).square().mean(), None, model, rho=0.1, micro_batches=parts)
    twin, halves = mlp(), [x[:3], x[3:4]]
    msam.backward(lambda part: twin(part).square().mean(), None, twin, rho=0.1, micro_batches=halves)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)
