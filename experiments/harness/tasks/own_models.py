"""What users bring along: the source of a model that they wrote, and weights to start from."""

import hashlib
import inspect
import sys
from pathlib import Path

import torch
from torch import nn

from experiments.harness.runs.spec import Network
from experiments.harness.tasks.storage import DataError, reject_checksum


def source_hash(model: str, built: nn.Module) -> dict[str, str]:
    """For the record: a hash of the files that define a `module:callable` model; empty for other models.

    These are the file of the module and those that define the classes of the model's parts, except installed packages.
    """
    if ":" not in model or "/" in model:
        return {}
    classes = {type(part) for part in built.modules()}
    modules = {model.partition(":")[0], *(cls.__module__ for cls in classes)}
    files = {path for name in modules if (path := _file_of(name)) is not None}
    if not files:
        return {"model_code": "unknown"}
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: (path.name, str(path))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {"model_code": digest.hexdigest()[:16]}


def _file_of(module: str) -> Path | None:
    """The source file of a loaded module; None for an installed package, which `packages` records by its version."""
    try:
        file = inspect.getsourcefile(sys.modules[module])
    except (KeyError, TypeError):
        return None
    path = Path(file) if file else None
    installed = path is not None and {"site-packages", "dist-packages"} & set(path.parts)
    return path if path is not None and path.is_file() and not installed else None


def load_start(spec: Network, model: nn.Module) -> dict[str, str]:
    """Load the spec's start weights, if it has any, into the model; all of them must be there and fit.

    Returns:
        `start_weights_checksum`, for the record; empty without start weights.

    Raises:
        DataError: if the file is missing, altered or no safetensors file, or its tensors do not fit the model.
    """
    if not (named := spec.flat["start_weights"]):
        return {}
    from safetensors.torch import load

    name, _, digest = named.rpartition("@")
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"The start weights {path} do not exist: correct start_weights, or put the file there.")
    content = path.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if not actual.startswith(digest):
        mend = f"If these are the weights that you mean, give start_weights={name}@{actual[:12]}."
        reject_checksum(path, f"sha256 {digest}", actual, mend)
    try:
        weights = load(content)
    except Exception as error:  # safetensors has an exception class of its own, and tensors may be cut off
        raise DataError(f"The start weights {path} cannot be read ({error}): save them with safetensors.") from error
    _fit(path, weights, model)
    model.load_state_dict(weights)
    return {"start_weights_checksum": actual}


def _fit(path: Path, weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Reject weights that lack a tensor, have another one, or one of another shape or type or without finite values."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in expected]
    for name in expected.keys() & weights.keys():
        ours, theirs = expected[name], weights[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            form = f"{theirs.dtype} {tuple(theirs.shape)} where the model has {ours.dtype} {tuple(ours.shape)}"
            problems.append(f"{name} is {form}")
        elif theirs.is_floating_point() and not theirs.isfinite().all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise DataError(
            f"The start weights {path} do not fit the model: {sorted(problems)[0]}{more}. Save the whole state_dict of "
            "the same model."
        )
