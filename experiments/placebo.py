"""A placebo: mSAM on the ResNet of Table 1, against itself at other seeds.

    python -m experiments run placebo --profile cpu --seeds published

The runs are those of Table 1's mSAM on ResNet-8, at the seeds from 16 on. The table placebo compares them, unpaired,
with the seeds from 0 on, which Table 1 has. The two sets differ in nothing but their seeds, so a difference that looks
significant is one by chance. The comparison is fixed beforehand, belongs to no family of a claim, and is reported
whatever comes out.

Expected: no difference; with 16 seeds each the interval is +- 0.6 points wide (0.01 +- 0.59).
"""

from dataclasses import replace

from experiments import resnet_cifar

TABLE = "placebo"

FIRST = 16
"""The first seed of the second set; Table 1 has the seeds below."""

RUNS = {"cpu": [replace(cell, seed=FIRST) for cell in resnet_cifar.RUNS["cpu"] if cell.method == "msam"]}
