"""The time left: from earlier runs at first, then from what runs take here."""

from dataclasses import replace

import pytest

from experiments.harness.machine.forecast import Forecast
from experiments.harness.runs import catalogue
from experiments.harness.runs.estimate import Estimate, load_estimate, work
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.record import record_of
from tests.specs import BASE, four_arms

BLOCK = four_arms(replace(BASE, epochs=40, train_examples=1024), sam_rho=0.1, msam_rho=0.1)
CELLS = [*BLOCK, *(replace(cell, model="vit-micro", base_optimizer="adamw") for cell in BLOCK)]


OVERHEAD = 4.0
"""What a run takes before its first step; the estimate of these tests takes it to be 2 seconds."""


def simulated(specs, estimate, jobs, actual):
    """The forecasts at each half second of runs that take `actual(spec)` seconds, and the total."""
    forecast, waiting, running, now, forecasts = Forecast(specs, estimate, jobs), list(specs), {}, 0.0, []
    while waiting or running:
        while waiting and len(running) < jobs:
            running[waiting.pop(0)] = now
        done = {spec: (now - begun - OVERHEAD) / (actual(spec) - OVERHEAD) for spec, begun in running.items()}
        forecast.observe({spec: min(1.0, max(0.0, share)) for spec, share in done.items()}, now)
        forecasts.append((now, forecast.left()))
        now += 0.5
        for spec in [spec for spec, begun in running.items() if now - begun >= actual(spec)]:
            del running[spec]
            forecast.finished(spec, now)
    return forecasts, now


@pytest.mark.parametrize("slower", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_the_forecast_is_within_a_factor_of_one_and_a_half_after_the_first_steps(slower, jobs):
    """On a machine that is faster or slower than the one that the times come from, by one factor for all models."""
    per_example = {cell: (0.001 if cell.model == "resnet8" else 0.003) for cell in CELLS}
    specs = with_seeds(CELLS, 3)
    estimate = Estimate({}, {}, {}, overhead=2.0)
    estimate = replace_by_model(estimate, per_example)
    forecasts, total = simulated(specs, estimate, jobs, lambda spec: OVERHEAD + slower * estimate.seconds(spec))
    after = [(now, left) for now, left in forecasts if now > 0.1 * total / len(specs) * jobs + 15 * slower]
    assert all(2 / 3 < left / (total - now) < 1.5 for now, left in after if total - now > 20)
    if slower == 1.0:
        assert forecasts[0][1] == pytest.approx(total, rel=0.25)


def replace_by_model(estimate, per_example):
    from experiments.harness.runs.estimate import _model_key

    return replace(estimate, by_model={_model_key(cell): seconds for cell, seconds in per_example.items()})


def test_a_model_without_runs_here_is_corrected_by_the_others_and_by_its_own_as_soon_as_it_has_some():
    resnet, vit = CELLS[0], CELLS[4]
    estimate = replace_by_model(Estimate({}, {}, overhead=0.0), {resnet: 0.001, vit: 0.001})
    forecast = Forecast([resnet, vit], estimate, 1)
    assert not forecast.calibrated
    expected = forecast.seconds(vit)
    forecast.observe({resnet: 0.0}, 0.0)
    forecast.observe({resnet: 0.1}, 30.0)
    forecast.finished(resnet, 30.0 + 2 * 0.9 * forecast.expected[resnet])
    assert forecast.calibrated
    assert forecast.seconds(vit) == pytest.approx(30.0 + 2 * expected), "30 seconds before the first step"
    forecast.observe({vit: 0.1}, 100.0)
    forecast.observe({vit: 0.5}, 100.0 + 5 * 0.4 * expected)
    besides = 15.0  # the median of 30 seconds before the first step, and of none
    assert forecast.seconds(vit) == pytest.approx(besides + 5 * expected)
    assert forecast.left() == pytest.approx(0.5 * (besides + 5 * expected))


def test_a_resumed_run_counts_only_what_it_trains_now():
    spec = CELLS[0]
    forecast = Forecast([spec], replace_by_model(Estimate({}, {}, overhead=0.0), {spec: 0.001}), 1)
    forecast.observe({spec: 0.75}, 0.0)
    forecast.observe({spec: 1.0}, 0.25 * forecast.expected[spec])
    assert forecast.seconds(spec) == pytest.approx(forecast.expected[spec])


def test_steps_that_are_alike_decide_before_the_model_does(tmp_path):
    base, _, _, msam = BLOCK
    for cell, seconds in ((base, 10.0), (msam, 50.0)):
        record = record_of(cell, tmp_path)
        record.create(cell)
        record.add_environment({"wall_seconds": seconds + 4.0})
        record.finish({"wall_seconds": seconds})
    estimate = load_estimate(tmp_path)
    longer = replace(msam, epochs=80)
    assert estimate.seconds(longer) == pytest.approx(100.0)
    assert estimate.weight(longer) == pytest.approx(105.0), "and what a run takes besides, here 4 + 1 seconds"
    assert estimate.here
    assert work(longer) == 2 * work(msam)


def test_plan_says_where_its_times_come_from(capsys):
    from experiments.harness.runs.plan import print_plan
    from experiments.harness.runs.selection import Runs

    print_plan(Runs("table1", "cpu"), 2)
    assert catalogue.cells("table1", "cpu")
    assert "workers, from " in capsys.readouterr().out
