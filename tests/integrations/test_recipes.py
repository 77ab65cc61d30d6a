"""Each recipe of docs/integrations.md is right to the number: `python -m tests.integrations` prints the table."""

import ast

import pytest
import torch

from tests.integrations import hugging_face, lightnings, ranks
from tests.integrations.catalogue import all_cases, alone
from tests.integrations.problems import RECIPES, RHO, RIGHT, Recorder, recipe

pytestmark = [
    pytest.mark.rare,
    pytest.mark.filterwarnings("ignore"),  # other libraries' own
]


def marked(case):
    marks = [pytest.mark.needs(need) for need in case.needs]
    return pytest.param(case, marks=marks, id=f"{case.framework}, {case.setting}")


@pytest.mark.parametrize("case", [marked(case) for case in alone()])
def test_the_gradient_at_the_optimizers_step(case):
    """Against float64, and at rho = 0 against the stock framework."""
    assert case.error() <= RIGHT
    assert case.error_at_zero() <= RIGHT


@pytest.mark.needs("accelerate", "lightning")
def test_the_gradient_at_the_optimizers_step_of_two_ranks():
    errors = {f"{case.framework}, {case.setting}": (case.error(), case.error_at_zero()) for case in ranks.cases()}
    assert {name: both for name, both in errors.items() if max(both) > RIGHT} == {}
    assert len(errors) == 6


def test_every_recipe_is_measured_with_and_without_accumulation():
    settings = {name: {case.setting for case in all_cases() if case.framework == name} for name in RECIPES}
    for name, found in settings.items():
        assert any("accumulation 4" in setting for setting in found), name
        assert any("accumulation 4" not in setting for setting in found), name


def test_the_trainer_is_short():
    (made,) = [node for node in ast.parse(RECIPES["Hugging Face Trainer"]).body if getattr(node, "name", "") == "MSAM"]
    lines = [line for line in RECIPES["Hugging Face Trainer"].splitlines()[made.lineno - 1 : made.end_lineno] if line]
    assert len(lines) <= 15


# What a Trainer logs and evaluates


@pytest.mark.needs("accelerate")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", ["words", "classes"])
def test_the_trainers_log_and_evaluation_are_stock(kind, accumulate):
    make = hugging_face.causal_model if kind == "words" else hugging_face.classifier
    results = []
    for rho in (None, RHO):
        made = hugging_face.fitted(make, kind, accumulate, rho)
        evaluated = made.evaluate(hugging_face.rows(8, kind))["eval_loss"]
        results.append((made.state.log_history[0]["train_loss"], evaluated))
    assert results[1] == pytest.approx(results[0], rel=1e-6)


@pytest.mark.needs("accelerate", "trl")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_log_of_sft_is_stock(accumulate):
    logs = []
    for rho in (None, RHO):
        made = hugging_face.sft_fitted(accumulate, rho, logging_strategy="steps", logging_steps=1)
        logs.append(made.state.log_history[:2])
    names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
    for stock, ours in zip(*logs, strict=True):
        assert {name: ours[name] for name in names} == pytest.approx({name: stock[name] for name in names}, rel=1e-5)


@pytest.mark.needs("lightning")
def test_lightnings_validation_is_stock():
    found = []
    for rho in (None, RHO):
        model = lightnings.module(rho)
        lightnings.fit(model, lightnings.token_batches(2))
        found.append(model.trainer.callback_metrics["validation"].item())
    assert found[0] == found[1]


# A real optimizer that needs train(), and fp16


@pytest.mark.needs("accelerate", "schedulefree")
def test_schedule_free_trains_as_with_the_stock_trainer():
    """At rho = 0, with weights that move; the optimizer refuses a step without train()."""
    from schedulefree import AdamWScheduleFree

    weights = []
    for rho in (None, 0.0):
        kind = lambda params: AdamWScheduleFree(params, lr=1e-2)  # noqa: E731
        made = hugging_face.fitted(hugging_face.causal_model, "words", 2, rho, optimizer=kind)
        weights.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    assert not torch.equal(
        weights[0], torch.cat([p.detach().flatten() for p in hugging_face.causal_model().parameters()])
    )
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.needs("gpu", "accelerate")
def test_fp16_in_the_trainer():
    """A stock GradScaler: the gradient that is left after unscaling, against float64, within fp16's rounding."""
    (found, *_) = hugging_face.trainer(hugging_face.causal_model, "words", 1, RHO, fp16=True, use_cpu=False)
    expected = hugging_face.expected(hugging_face.causal_model, "words", 1, RHO)
    assert (found.cpu() - expected).norm() / expected.norm() < 0.01


@pytest.mark.needs("gpu", "lightning")
def test_fp16_in_lightning():
    """The same through Lightning's precision plugin."""
    (found, *_) = lightnings.lightning(1, None, RHO, precision="16-mixed", accelerator="gpu")
    expected = lightnings.expected(1, None, RHO)
    assert (found.cpu() - expected).norm() / expected.norm() < 0.01


@pytest.mark.needs("ignite")
def test_rho_is_replaced_in_a_recipe():
    """What the tests themselves rest on."""
    defined = recipe("ignite", 0.25)["msam_trainer"]
    assert 0.25 in [
        value for code in defined.__code__.co_consts if hasattr(code, "co_consts") for value in code.co_consts
    ]
    recorder = Recorder([torch.nn.Parameter(torch.ones(2))], lr=0.0)
    recorder.param_groups[0]["params"][0].grad = torch.tensor([1.0, 2.0])
    recorder.step()
    assert recorder.gradients[0].tolist() == [1.0, 2.0]
