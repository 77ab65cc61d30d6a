"""How flat the minima are: Hessian spectra and sharpness of the networks of Tables 1 and 2 (Table 3).

    python -m experiments run hessian --profile cpu       # first trains the missing networks

The final network of each cell of `resnet_cifar`, `wrn_cifar`, `vit_cifar` and, on GPUs, `bert_glue` and `roberta_glue`
is measured on its first 256 (smoke: 16, gpu and paper: 512) training and test examples. Finished networks are not
retrained. Encoders have 22 million weights or more, so only the paper profile measures them. The radius for sharpness
was fixed in advance and is the same for all methods of a data set: 0.05 as for SAM on CIFAR-10 in Foret et al. 2021,
and for texts 0.001, the middle of the published range for encoders.

Expected for ResNet-8 (n=8, +- 95 %): lambda 1 of 84 +- 19 with SGD, 3.2 +- 0.2 for twice the epochs, 114 +- 21 over
micro-batches, 116 +- 20 with SAM, 112 +- 13 over micro-batches, 87 +- 6 with mSAM; for WRN-10-1 in the same order
87 +- 23, 3.2 +- 0.4, 115 +- 17, 59 +- 8, 80 +- 15 and 65 +- 11 (1,024 images, 288 steps, twice: 576). A run takes two
to three minutes for ResNet-8, less than two for WRN-10-1 and one for the ViT, on one core of an AMD EPYC with AVX2; up
to five and a half at seed 0 for figures.
"""

from experiments import bert_glue, resnet_cifar, roberta_glue, vit_cifar, wrn_cifar
from experiments.harness.runs.grids import curvature_of

TABLE = "table3"

PROFILES = ("smoke", "cpu", "gpu", "paper")
IMAGES = {p: [c for e in (resnet_cifar, vit_cifar, wrn_cifar) for c in e.RUNS[p]] for p in PROFILES}
TEXTS = [c for e in (bert_glue, roberta_glue) for c in e.RUNS["paper"] if c.dataset in ("mrpc", "rte")]
EXAMPLES = {"smoke": 16, "cpu": 256, "gpu": 512, "paper": 512}

RUNS = {profile: curvature_of(IMAGES[profile], examples=examples, rho=0.05) for profile, examples in EXAMPLES.items()}
RUNS["paper"] += curvature_of(TEXTS, examples=256, rho=0.001)
