"""Scores of text models: the official metrics, calibration, and the same after quantisation to int8."""

import copy
import warnings
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn

from experiments.harness.runs.facts import TextSet
from experiments.harness.tasks.task import Evaluation, calibration_error

MOST_INT8 = 2000
"""The most texts that a network is scored on after quantisation, which runs on the CPU."""


def evaluation(task: TextSet, part: str, outputs: Tensor, labels: np.ndarray) -> Evaluation:
    """The scores and predictions of a part.

    The loss is the mean negative log likelihood without label smoothing, or the mean squared error.

    Args:
        task: The task.
        part: `test`, `test_mismatched` or `holdout`; names begin with it.
        outputs: Logits, (N, classes), on the CPU; for a regression (N, 1).
        labels: Classes or values, (N,).
    """
    values = scores(task, outputs.numpy(), labels)
    numbers = {f"{part}_{name}": value for name, value in values.items()}
    numbers[f"{part}_score"] = values[task.metrics[0]]
    if task.labels:
        classes = torch.from_numpy(labels)
        numbers[f"{part}_loss"] = F.cross_entropy(outputs.double(), classes).item()
        numbers[f"{part}_ece"] = calibration_error(outputs, classes)
    else:
        numbers[f"{part}_loss"] = F.mse_loss(outputs[:, 0].double(), torch.from_numpy(labels).double()).item()
    answers = _predicted(task, outputs.numpy())
    return Evaluation(numbers, {part: answers, f"{part}_labels": labels.astype(answers.dtype)})


def int8_evaluation(task: TextSet, part: str, outputs: Tensor, labels: np.ndarray) -> Evaluation:
    """The official metrics and predictions of a quantised network; see `evaluation`."""
    values = scores(task, outputs.numpy(), labels)
    numbers = {f"{part}_int8_{name}": value for name, value in values.items()}
    numbers[f"{part}_int8_score"] = values[task.metrics[0]]
    return Evaluation(numbers, {f"{part}_int8": _predicted(task, outputs.numpy())})


def merged(parts: Iterable[Evaluation]) -> Evaluation:
    """The scores and predictions of several parts."""
    parts = list(parts)
    return Evaluation(
        {name: value for part in parts for name, value in part.scores.items()},
        {name: array for part in parts for name, array in part.predictions.items()},
    )


def quantised(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose linear layers have int8 weights and quantise their inputs as they come."""
    with warnings.catch_warnings():
        # Its successor, torchao, would be one more package that must fit torch's release.
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_channel", UserWarning)
        copied = copy.deepcopy(model).cpu().eval()
        return torch.ao.quantization.quantize_dynamic(copied, {nn.Linear}, dtype=torch.qint8, inplace=True)


def scores(task: TextSet, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's official metrics, each in [-1, 1].

    Args:
        task: The task.
        outputs: Logits, (N, classes); for a regression (N, 1).
        labels: Classes or values, (N,).
    """
    predicted = outputs.argmax(1) if task.labels else outputs[:, 0].astype(np.float64)
    if not task.labels and np.ptp(predicted) == 0:
        return dict.fromkeys(task.metrics, 0.0)  # the correlation with a constant is undefined
    known = {
        "accuracy": lambda: accuracy_score(labels, predicted),
        "f1": lambda: f1_score(labels, predicted, zero_division=0),
        "matthews_correlation": lambda: matthews_corrcoef(labels, predicted),
        "pearson": lambda: pearsonr(predicted, labels).statistic,
        "spearman": lambda: spearmanr(predicted, labels).statistic,
    }
    return {name: float(known[name]()) for name in task.metrics}


def majority(task: TextSet, trained: np.ndarray, labels: np.ndarray) -> float:
    """The score of always predicting the most frequent training label (for a regression, the mean)."""
    if not task.labels:
        return 0.0
    answer = np.bincount(trained, minlength=len(task.labels)).argmax()
    outputs = np.zeros((len(labels), len(task.labels)))
    outputs[:, answer] = 1
    return scores(task, outputs, labels)[task.metrics[0]]


def _predicted(task: TextSet, outputs: np.ndarray) -> np.ndarray:
    """The predicted classes as uint8, or the predicted values as float32."""
    return outputs.argmax(1).astype(np.uint8) if task.labels else outputs[:, 0].astype(np.float32)
