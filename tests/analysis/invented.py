"""Runs with invented numbers, their results, and their published files, for the tests of all exhibits."""

from analysis.collect import Finished
from analysis.exhibit import Target
from analysis.exhibits import exhibit_of, pages
from analysis.frames import Results
from analysis.publish import publish, redraw, target
from experiments.harness.runs.grids import timed_steps, with_seeds

SESSION = {"commit": "a" * 40, "dirty": False, "code": "c" * 16, "cpu": "a processor"}
GAIN = {"base": 0.0, "control": 0.01, "sam": 0.02, "shared": 0.03, "msam": 0.04}
LAMBDA = {"base": 100.0, "control": 90.0, "sam": 60.0, "shared": 50.0, "msam": 40.0}
PARAMETERS = {"resnet8": 100, "vit-micro": 1000, "wrn-10-1": 10_000}


def study_run(spec, shift=0.0):
    """A network whose accuracy is 50 %, plus its method's gain, rho / 10 and seed / 100."""
    accuracy = 0.5 + GAIN[spec.method] + spec.rho / 10 + spec.seed / 100 + shift
    lines = [
        {"epoch": epoch, "train_loss": 2.0 / epoch, "sharpness": 0.1 * spec.rho, "lambda_1": 10.0 * epoch + spec.seed}
        for epoch in (1, 2)
    ]
    summary = {"test_accuracy": accuracy, "test_loss": 2.0 - accuracy, "train_accuracy": 0.9}
    summary |= {"wall_seconds": 10.0 * (1 + (spec.rho > 0))}
    if spec.curvature_every:
        summary |= {"lambda_1": 80.0 - spec.rho + spec.seed, "greatest_lambda_1": 90.0}
    return Finished(spec, summary, lines, [SESSION])


def curvature_run(spec, shift=0.0):
    """A run whose lambda 1 is that of its method plus the seed."""
    value = LAMBDA[spec.method] + spec.seed + shift
    summary = {"train_lambda_1": value, "test_lambda_1": 2 * value, "train_lambda_ratio": 3.0, "train_trace": 5 * value}
    summary |= {"test_accuracy": 0.5 - value / 1000}
    summary |= {"train_ascent_sharpness": value / 1e4, "train_average_sharpness": 1e-4, "train_residual": 1e-4}
    for m in (2**k for k in range(9)):  # enough columns that adding them one by one would warn
        summary |= {f"train_penalty_m{m}": m**0.5, f"train_squared_m{m}": float(m), f"train_sharpness_m{m}": 0.05 * m}
    density = {"density_nodes": [0.0, value], "density_weights": [0.9, 0.1]}
    slices = {"slice_positions": [round(-1 + 0.1 * i, 1) for i in range(21)], "slice_losses": [1.0] * 21}
    slices["plane_losses"] = [1.0 + 0.01 * i for i in range(121)]
    lines = [{"part": "train", "measure": "density", **density}, {"part": "train", "measure": "slices", **slices}]
    return Finished(spec, {**summary, "wall_seconds": 1.0}, lines, [SESSION])


def stability_run(spec, error=0.001):
    """A simulated boundary with this relative error."""
    summary = {"predicted_sharpness": 20.0, "stable_sharpness": 20 * (1 + error), "relative_error": error}
    return Finished(spec, {**summary, "wall_seconds": 1.0}, [], [SESSION])


def cost_run(spec, shift=0.0):
    """A perturbed step takes 2 ms for each micro-batch and 0.5 ms for each example. Ten times the parameters take four
    times as long; an unperturbed step takes half the time, and so do two workers."""
    size = 4.0 ** (len(str(PARAMETERS[spec.model])) - 3)
    summary = {"parameters": PARAMETERS[spec.model], "wall_seconds": 9.0}
    for workers in (1, 2):
        for step in timed_steps(spec, workers):
            whole = (1 + (step.rho > 0)) / 2 / workers
            seconds = whole * size * (0.002 * step.micro_batches + 0.0005 * spec.batch_size)
            base = size * (0.002 + 0.0005 * spec.batch_size) / 2 / workers
            measures = {"seconds": seconds, "ratio": seconds / base + spec.seed / 10 + shift, "reduced_bytes": 4e6}
            sam = size * (0.002 + 0.0005 * spec.batch_size) / workers
            measures["over_sam"] = seconds / sam + spec.seed / 1000
            measures |= {"examples_per_second": spec.batch_size / seconds, "memory_bytes": 1e6 / step.micro_batches}
            summary |= {f"{step.method}_m{step.micro_batches}_w{workers}_{key}": v for key, v in measures.items()}
    return Finished(spec, summary, [], [SESSION])


def any_run(spec):
    """A run of any kind, as the function for its kind invents it."""
    return {"curvature": curvature_run, "cost": cost_run, "theory": stability_run}.get(spec.kind, study_run)(spec)


def results_of(cells, seeds, run, *shift):
    """The results of all runs of these cells, invented by `run`."""
    return Results.of([run(spec, *shift) for spec in with_seeds(cells, seeds)])


def document(name, frame, cells, seeds, states=None, used=()):
    """The document of some cells in the exhibit of this name."""
    return exhibit_of(name).document(Target(name, tuple(cells), seeds, tuple(used)), frame, states)


def pictures(results, *targets):
    """The files of all figures of some tables."""
    return {path: data for page in pages(results, {t.name: t for t in targets}) for path, data in page.files.items()}


def contents(folder):
    """The files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*.*")}


def published_twice(root, names, results):
    """Publish tables, delete all except the three files of runs, and redraw; return the files before and after."""
    folder = root / "smoke"
    publish(folder, "smoke", [target(name, "smoke") for name in names], results)
    before = contents(folder)
    for path in before:
        if path.name not in ("runs.csv", "curves.csv", "provenance.jsonl"):
            path.unlink()
    redraw(folder, "smoke")
    return before, contents(folder)
