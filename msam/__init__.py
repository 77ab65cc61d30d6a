"""mSAM: micro-batch-averaged sharpness-aware minimization (arXiv 2302.09693), as a gradient.

`msam.backward` takes the place of `loss.backward()`; optimizer, scheduler and clipping stay as they are. `msam.loss` is
the same as a loss, for loops that others own.
"""

from msam.as_loss import Loss, loss
from msam.diagnosis import Diagnosis, diagnose
from msam.gradient import Step, backward
from msam.graph import capture
from msam.mean import Output
from msam.microbatch import split

__version__ = "0.1.0"
__all__ = ["Diagnosis", "Loss", "Output", "Step", "backward", "capture", "diagnose", "loss", "split"]
