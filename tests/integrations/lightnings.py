"""The recipes of Lightning: automatic and manual optimization, accumulation, clipping, precision, two ranks."""

import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from tests.integrations.problems import (
    Case,
    Recorder,
    clipped,
    in_bf16,
    mean_and_count,
    recipe,
    reference,
    tagger,
    token_batches,
)


def lightning(
    accumulate: int, clip: float | None, rho: float | None, manual: bool = False, **more: Any
) -> list[Tensor]:
    """Two optimizer steps over the same batches, or the batches of this rank."""
    model = module(rho, manual)
    fit(model, 2 * token_batches(accumulate), accumulate_grad_batches=accumulate, gradient_clip_val=clip, **more)
    return model.recorder.gradients


def module(rho: float | None, manual: bool = False):
    import lightning as package

    if rho is None:

        class Base(package.LightningModule):
            """The stock loop."""

            def training_step(self, batch, index):
                return self.loss(batch)[0]

    else:
        Base = recipe("Lightning", rho)["ManualMSAM" if manual else "MSAM"]

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.network = tagger()

        def loss(self, part):
            return mean_and_count(self.network, part)

        def validation_step(self, batch, index):
            self.log("validation", self.loss(batch)[0], batch_size=1)

        def configure_optimizers(self):
            self.recorder = Recorder(self.parameters())
            return self.recorder

    return Model()


def fit(model: Any, batches: list[Any], **options: Any) -> None:
    import lightning as package

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    usual = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "use_distributed_sampler": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaders = [DataLoader(part, batch_size=None) for part in (batches, batches[:1])]
        package.Trainer(**quiet, **usual | options).fit(model, *loaders)


def expected(accumulate: int, clip: float | None, rho: float) -> Tensor:
    """A mean over batches, each over its tokens."""
    batches = token_batches(accumulate)
    return clipped(reference(tagger(), mean_and_count, batches, [1 / accumulate] * accumulate, rho), clip)


def cases() -> Iterator[Case]:
    """Each with 1 and with 4 accumulated batches, if Lightning can."""
    part, needs = functools.partial, ("lightning",)
    for n in (1, 4):
        times = "accumulation 4" if n == 4 else "plain"
        for clip, what in ((None, ""), (0.01, ", clipping")):
            yield Case(
                "Lightning", f"automatic, {times}{what}", needs, part(lightning, n, clip), part(expected, n, clip)
            )
        double = part(lightning, n, None, precision="64-true")
        yield Case("Lightning", f"automatic, {times}, 64-true", needs, double, part(expected, n, None))
    manual = part(lightning, 1, None, manual=True)
    yield Case("Lightning", "manual", needs, manual, part(expected, 1, None))
    yield Case(
        "Lightning",
        "automatic, bf16-mixed",
        needs,
        part(lightning, 1, None, precision="bf16-mixed"),
        part(in_bf16, tagger, mean_and_count, token_batches(1)),
        in_bf16=True,
    )
