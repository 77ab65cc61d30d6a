"""From a spec to its task, whatever the domain."""

from pathlib import Path

from experiments.harness.runs.facts import IMAGES
from experiments.harness.runs.spec import Spec
from experiments.harness.tasks.task import Task


def build_task(spec: Spec, data_root: Path | None = None) -> Task:
    """The task of a spec. Draws the initial weights from torch's global generator, which must be seeded.

    Args:
        spec: The run.
        data_root: A folder to look for data in first; see `cifar.py`.

    Raises:
        DataError: if the data are not available.
    """
    if spec.dataset in IMAGES:
        from experiments.harness.tasks import images

        return images.image_task(spec, data_root)
    from experiments.harness.tasks import texts

    return texts.text_task(spec, data_root)
