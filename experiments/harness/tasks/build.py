"""From a spec to its task, whatever the domain, which is imported when it is first needed: it takes seconds."""

from pathlib import Path

from experiments.harness.runs.facts import is_images
from experiments.harness.runs.spec import Network
from experiments.harness.tasks.task import Task


def build_task(spec: Network, data_root: Path | None = None) -> Task:
    """The task of a spec. Draws the initial weights from torch's global generator, which must be seeded.

    Args:
        spec: The run.
        data_root: A folder to look for data in first; see `cifar.py`.

    Raises:
        DataError: if the data are not available.
    """
    if is_images(spec.dataset):
        from experiments.harness.tasks import images

        return images.image_task(spec, data_root)
    from experiments.harness.tasks import texts

    return texts.text_task(spec, data_root)


def check_task(spec: Network, data_root: Path | None = None) -> None:
    """Fetch and verify what a spec's task is made from, before any run starts.

    Raises:
        DataError: if it does not fit; `DataUnavailable` if no source has the data.
    """
    if is_images(spec.dataset):
        from experiments.harness.tasks import images

        images.check(spec, data_root)
    else:
        from experiments.harness.tasks import texts

        texts.check(spec, data_root)
