"""Text classification and regression: from a spec to a Task."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from experiments.harness import texts
from experiments.harness.data import DataError
from experiments.harness.spec import TEXT_MODELS, Spec
from experiments.harness.task import Task, generator, subsets
from experiments.harness.texts import TASKS, Glue, Texts

EVALUATION_BATCH = 64

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
"""Files of which a folder with a tokenizer has one."""

transformers.logging.set_verbosity_error()  # of new classifiers and long texts, which are expected here
transformers.utils.logging.disable_progress_bar()


def text_task(spec: Spec, data_root: str | None = None) -> Task:
    """A task of GLUE, or the movie snippets, with an encoder of transformers and a new head."""
    task = TASKS[spec.dataset]
    data = texts.load_texts(spec.dataset, Path(data_root) if data_root else None)
    tokenizer, model, origin = encoder(spec, task)
    device = torch.device(spec.device)
    model = model.to(device)

    train, holdout = subsets(spec, len(data.train.labels))
    trained = _Encoded(data.train.taken(train), tokenizer, spec.max_length)
    if spec.holdout_examples:
        scored = {"holdout": _Encoded(data.train.taken(holdout), tokenizer, spec.max_length)}
    else:
        names = {split: "test" if i == 0 else "test_mismatched" for i, split in enumerate(task.validation)}
        first = range(spec.test_examples) if spec.test_examples else None
        parts = {names[s]: v.taken(first[: len(v.labels)]) if first else v for s, v in data.validation.items()}
        scored = {part: _Encoded(v, tokenizer, spec.max_length) for part, v in parts.items()}

    def forward(batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.precision == "bfloat16"):
            return model(**inputs).logits.float()

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        if not task.labels:
            return F.mse_loss(logits.squeeze(1), labels)
        return F.cross_entropy(logits, labels, label_smoothing=spec.label_smoothing)

    def batches(epoch: int, first: int) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(trained), generator=generator(spec.seed, epoch)).tolist()
        for index in range(first, steps_per_epoch):
            yield trained.batch(order[index * spec.batch_size : (index + 1) * spec.batch_size], device)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        found = {}
        for part, examples in scored.items():
            outputs = torch.empty(len(examples), max(1, len(task.labels)))
            for chosen in torch.tensor(examples.by_length()).split(EVALUATION_BATCH):
                outputs[chosen] = forward(examples.batch(chosen.tolist(), device)).cpu()
            values = scores(task, outputs.numpy(), examples.labels)
            found |= {f"{part}_{name}": value for name, value in values.items()}
            found[f"{part}_score"] = values[task.metrics[0]]
            found[f"{part}_loss"] = loss_of(outputs, torch.from_numpy(examples.targets)).item()
            found[f"{part}_majority"] = majority(task, trained.labels, examples.labels)
        return found

    steps_per_epoch = len(trained) // spec.batch_size  # an incomplete last batch is left out
    return Task(
        model=model,
        loss_fn=lambda batch: loss_of(forward(batch), batch["labels"]),
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        evaluate=evaluate,
        data={"data_checksum": data.checksum, "data_source": data.source, "weights_source": origin},
    )


def encoder(spec: Spec, task: Glue) -> tuple[Any, nn.Module, str]:
    """Tokenizer and model of a spec, its head freshly drawn from torch's global generator; and where they came from.

    Raises:
        DataError: if they cannot be had or do not fit the spec, with what to do.
    """
    where, origin = _checkpoint(spec.model)
    offline = {"local_files_only": True} if not where.exists() and not texts.hub_answers() else {}
    place = str(where) if where.exists() else spec.model
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **offline)
    except (OSError, ValueError) as error:
        raise _not_to_be_had("tokenizer", spec.model, error) from error
    try:
        config = transformers.AutoConfig.from_pretrained(place, num_labels=max(1, len(task.labels)), **offline)
        _fit(spec, config)
        if spec.dropout is not None:
            for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
                setattr(config, name, spec.dropout)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            place,
            config=config,
            attn_implementation=spec.attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head of another task's size is drawn anew
            **offline,
        )
    except (OSError, ValueError) as error:
        raise _not_to_be_had("model", spec.model, error) from error
    return tokenizer, model, origin


def check(spec: Spec, data_root: str | None = None) -> None:
    """Find out before any training whether data, tokenizer and configuration of a spec can be had and fit.

    Raises:
        DataError: if not. `texts.NotToBeHad` if it is the data that no source has.
    """
    texts.load_texts(spec.dataset, Path(data_root) if data_root else None)
    encoder(spec, TASKS[spec.dataset])


def scores(task: Glue, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's official metrics, each in [-1, 1], from the model's outputs.

    Args:
        task: The task.
        outputs: Logits, (N, classes); of a regression (N, 1).
        labels: Classes or values, (N,).
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = outputs.argmax(1) if task.labels else outputs[:, 0].astype(np.float64)
    if not task.labels and np.ptp(predicted) == 0:
        return dict.fromkeys(task.metrics, 0.0)  # of a constant the correlation is not defined
    known = {
        "accuracy": lambda: accuracy_score(labels, predicted),
        "f1": lambda: f1_score(labels, predicted, zero_division=0),
        "matthews_correlation": lambda: matthews_corrcoef(labels, predicted),
        "pearson": lambda: pearsonr(predicted, labels).statistic,
        "spearman": lambda: spearmanr(predicted, labels).statistic,
    }
    return {name: float(known[name]()) for name in task.metrics}


def majority(task: Glue, trained: np.ndarray, labels: np.ndarray) -> float:
    """The score of whoever always answers with the commonest training label (of a regression, with the mean)."""
    if not task.labels:
        return 0.0
    answer = np.bincount(trained, minlength=len(task.labels)).argmax()
    outputs = np.zeros((len(labels), len(task.labels)))
    outputs[:, answer] = 1
    return scores(task, outputs, labels)[task.metrics[0]]


class _Encoded:
    """Texts as tokens, ready to be padded into batches."""

    def __init__(self, examples: Texts, tokenizer: Any, max_length: int) -> None:
        self.labels = examples.labels
        self.targets = examples.labels if examples.labels.dtype == np.int64 else examples.labels.astype(np.float32)
        self._tokenizer = tokenizer
        columns = [list(texts_) for texts_ in examples.sentences]
        self._tokens = tokenizer(*columns, truncation=True, max_length=max_length)

    def __len__(self) -> int:
        return len(self.labels)

    def by_length(self) -> list[int]:
        """All examples, the shortest first: batches of equals need little padding."""
        return sorted(range(len(self)), key=lambda i: len(self._tokens["input_ids"][i]))

    def batch(self, chosen: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """These examples, padded to the longest of them: so micro-batches of the batch agree in shape."""
        rows = {name: [values[i] for i in chosen] for name, values in self._tokens.items()}
        padded = self._tokenizer.pad(rows, return_tensors="pt")
        labels = torch.from_numpy(self.targets[list(chosen)])
        return {name: tensor.to(device) for name, tensor in {**padded, "labels": labels}.items()}


def _checkpoint(model: str) -> tuple[Path, str]:
    """A folder, which need not exist for a name of the hub; and what it is, for people."""
    if model == "minilm":
        return texts.minilm(), texts.MINILM
    if model in TEXT_MODELS:
        return Path("/nonexistent"), f"{model} from the hub"
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} holds no checkpoint (no config.json): name a folder in transformers' layout.")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise DataError(  # transformers would make an empty one up
            f"{folder} holds no tokenizer (none of {', '.join(TOKENIZERS)}): put the one of the model there."
        )
    return folder, f"the folder {folder.name}"


def _fit(spec: Spec, config: Any) -> None:
    """Refuse texts longer than the model has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if config.model_type in ("roberta", "xlm-roberta"):
        positions -= config.pad_token_id + 1  # its positions are counted from there
    if spec.max_length > positions:
        raise DataError(
            f"max_length is {spec.max_length}, but {spec.model} takes at most {positions} tokens: lower max_length."
        )


def _not_to_be_had(what: str, model: str, error: Exception) -> DataError:
    said = str(error).strip().splitlines()
    return DataError(
        f"The {what} of {model} could not be had ({said[0][:200] if said else type(error).__name__}): name a folder "
        "that holds config.json, the weights and the tokenizer's files, or run once with a network."
    )
