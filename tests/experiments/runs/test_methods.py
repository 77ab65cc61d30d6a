"""Arms: which runs belong to each, and what each is compared with."""

from dataclasses import replace

import pytest

from experiments.harness.runs.methods import ARMS, arm_of, arms_of, differing, reference
from tests.specs import BASE, four_arms

SGD, CONTROL, SAM, MSAM = FOUR = four_arms(BASE, sam_rho=0.1, msam_rho=0.2)
ASAM, MASAM = replace(SAM, rho=0.5, adaptive=True), replace(MSAM, rho=0.5, adaptive=True)
SHARED = replace(MSAM, rho=0.1, shared=True)


@pytest.mark.parametrize(
    ("cell", "name", "words"),
    [
        (SGD, "base", "SGD"),
        (CONTROL, "control", "SGD, m=4 micro-batches"),
        (SAM, "sam", "SAM"),
        (MSAM, "msam", "mSAM, m=4"),
        (SHARED, "shared", "SAM, m=4 micro-batches"),
        (ASAM, "asam", "ASAM"),
        (MASAM, "masam", "mSAM with ASAM's perturbation, m=4"),
    ],
)
def test_each_run_has_one_arm_and_its_name(cell, name, words):
    assert cell.method == arm_of(cell).name == name
    assert arm_of(cell).called(cell) == words


def test_arms_differ_in_words_and_in_how_they_are_drawn():
    for field in ("words", "legend", "colour", "line", "mark"):
        values = [str(getattr(arm, field)) for arm in ARMS.values()]
        assert len(set(values)) == len(values), field
    for arm in ARMS.values():
        assert set(arm.claimed) <= set(arm.against) <= set(ARMS) - {arm.name}


def partner(cell, name, cells, varies=()):
    return reference(cell, name, arms_of(cells, varies), varies)


def test_what_each_arm_is_compared_with():
    cells = [*FOUR, SHARED, ASAM, MASAM]
    assert partner(MSAM, "shared", cells) == SHARED
    assert [partner(SHARED, name, cells) for name in ARMS["shared"].against] == [SGD, SAM, CONTROL]
    assert [partner(MSAM, name, cells) for name in ("base", "sam", "control")] == [SGD, SAM, CONTROL]
    assert [partner(MASAM, name, cells) for name in ARMS["masam"].against] == [SGD, SAM, CONTROL, ASAM]
    assert partner(SAM, "base", cells) == SGD
    assert partner(SAM, "sam", cells) is None


def test_the_same_rho_is_preferred_and_the_same_m_is_required():
    sams = [replace(SGD, rho=rho) for rho in (0.05, 0.2)]
    controls = [replace(SGD, micro_batches=m) for m in (2, 8)]
    cells = [SGD, *sams, *controls, MSAM]
    assert partner(MSAM, "sam", cells) == sams[1]
    assert partner(replace(MSAM, rho=0.3), "sam", [*cells, replace(MSAM, rho=0.3)]) == sams[0]
    assert partner(MSAM, "control", cells) is None
    assert partner(replace(MSAM, micro_batches=8), "control", [*cells, replace(MSAM, micro_batches=8)]) == controls[1]


def test_a_study_of_weight_decay_compares_equals():
    """Before studies declared what they vary, mSAM at 5e-4 was compared with SGD at 0."""
    decayed = [replace(cell, weight_decay=5e-4) for cell in FOUR]
    cells = [*FOUR, *decayed]
    for varies in ((), ("weight_decay",)):
        for block in (FOUR, decayed):
            sgd, control, sam, msam = block
            assert [partner(msam, name, cells, varies) for name in ("base", "sam", "control")] == [sgd, sam, control]
            assert partner(sam, "base", cells, varies) == sgd
    alone = [*FOUR, decayed[3]]
    assert partner(decayed[3], "base", alone) is None
    assert partner(decayed[3], "base", alone, ("weight_decay",)) == SGD, "declared, and nothing closer"
    assert differing(decayed[3], SGD) == {"weight_decay", "rho", "micro_batches"}


@pytest.mark.parametrize("field", ["learning_rate", "epochs", "momentum", "batch_size", "label_noise", "clip_norm"])
def test_other_fields_must_be_equal(field):
    other = replace(
        MSAM, **{field: {"learning_rate": 0.4, "epochs": 3, "momentum": 0.5, "batch_size": 64}.get(field, 0.5)}
    )
    assert partner(other, "sam", [*FOUR, other]) is None


def test_an_arm_may_be_a_change_of_its_blocks_base(twice):
    longer = replace(SGD, epochs=4)
    assert arms_of([longer])[longer] is ARMS["base"]
    arms = arms_of([*FOUR, longer])
    assert arms[longer] is twice
    assert twice.called(longer) == "SGD, twice the epochs"
    assert reference(longer, "base", arms) == SGD
    assert reference(MSAM, "base", arms) == SGD
    assert arms_of([*FOUR, longer], varies=("epochs",))[longer] is ARMS["base"], "a study of epochs has bases"
