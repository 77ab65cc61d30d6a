"""Builds a spec's task. The module for images or texts takes seconds to import, so it is imported when needed."""

from pathlib import Path

from experiments.harness.runs.facts import is_images
from experiments.harness.runs.spec import Network
from experiments.harness.tasks.task import Task


def build_task(spec: Network, data_root: Path | None = None) -> Task:
    """The task of a spec. Initial weights are drawn from torch's global generator: seed it first.

    Args:
        spec: The run.
        data_root: A folder to search for data first; see `cifar.py`.

    Raises:
        DataError: if the data are not available.
    """
    if is_images(spec.dataset):
        from experiments.harness.tasks import images

        return images.image_task(spec, data_root)
    from experiments.harness.tasks import texts

    return texts.text_task(spec, data_root)


def check_task(spec: Network, data_root: Path | None = None) -> None:
    """Fetch and verify a spec's data and model, before any run starts.

    Raises:
        DataError: if they do not match the spec; `DataUnavailable` if no source has the data.
    """
    if is_images(spec.dataset):
        from experiments.harness.tasks import images

        images.check(spec, data_root)
    else:
        from experiments.harness.tasks import texts

        texts.check(spec, data_root)
