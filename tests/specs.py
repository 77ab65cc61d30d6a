"""The spec that tests start from: change what a test is about with `replace`."""

from experiments.harness.runs.spec import Training

BASE = Training(
    profile="smoke",
    dataset="cifar10",
    model="resnet8",
    base_optimizer="sgd",
    learning_rate=0.1,
    epochs=2,
    batch_size=32,
)
