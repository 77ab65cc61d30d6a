"""The task of a spec for text classification and regression.

Architectures are imported here, so that the pool's fork server imports them once. Otherwise transformers would import
them in every worker, when it is first asked for a model.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import BertForSequenceClassification, RobertaForSequenceClassification  # noqa: F401

from experiments.harness.runs.facts import MODELS, TextSet, text_set
from experiments.harness.runs.spec import Network
from experiments.harness.tasks import glue_files
from experiments.harness.tasks.data import load
from experiments.harness.tasks.glue_files import Texts
from experiments.harness.tasks.own_models import load_start
from experiments.harness.tasks.storage import DataError
from experiments.harness.tasks.task import Evaluation, Task, generator, subsets, to_device
from experiments.harness.tasks.text_scores import (
    MOST_INT8,
    evaluation,
    int8_evaluation,
    majority,
    merged,
    quantised,
    scores,
)

EVALUATION_BATCH = 64

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
"""A folder with a tokenizer has at least one of these files."""

transformers.logging.set_verbosity_error()  # new classifier heads and long texts are expected
transformers.utils.logging.disable_progress_bar()


def text_task(spec: Network, data_root: Path | None = None) -> Task:
    """A GLUE task, or the movie snippets, with an encoder from transformers and a new head."""
    task = text_set(spec.dataset)
    data = load(spec.dataset, data_root)
    tokenizer, model, origin = encoder(spec, task)
    started = load_start(spec, model)
    weights = checksum(model)

    train, holdout = subsets(spec, len(data.train.labels))
    trained = encoded(spec, data.train.taken(train), tokenizer)
    if spec.holdout_examples:
        scored = {"holdout": encoded(spec, data.train.taken(holdout), tokenizer)}
    else:
        names = {split: "test" if i == 0 else "test_mismatched" for i, split in enumerate(task.validation)}
        first = range(spec.test_examples) if spec.test_examples else None
        parts = {names[s]: v.taken(first[: len(v.labels)]) if first else v for s, v in data.validation.items()}
        scored = {part: encoded(spec, v, tokenizer) for part, v in parts.items()}
    provenance = {
        "data_checksum": hashlib.sha256(f"{data.checksum} {weights}".encode()).hexdigest(),
        "data_source": data.source,
        "texts_checksum": data.checksum,
        "weights_checksum": weights,
        "weights_source": origin,
        **started,
    }
    return task_of(spec, model, trained, scored, provenance)


def task_of(
    spec: Network, model: nn.Module, trained: "_Examples", scored: Mapping[str, "_Examples"], data: dict[str, str]
) -> Task:
    """The task of a spec with this model on these tokens; `data` is for the record."""
    task = text_set(spec.dataset)
    device = torch.device(spec.device)
    model = model.to(device)

    def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
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
    def outputs_of(model: nn.Module, examples: "_Examples", count: int) -> Tensor:
        outputs, place = torch.empty(count, task.outputs), next(model.parameters()).device
        for chosen in torch.tensor([i for i in examples.by_length() if i < count]).split(EVALUATION_BATCH):
            outputs[chosen] = forward(model, examples.batch(chosen.tolist(), place)).cpu()
        return outputs

    def evaluate() -> Evaluation:
        model.eval()
        parts: list[Evaluation] = []
        for part, examples in scored.items():
            parts.append(evaluation(task, part, outputs_of(model, examples, len(examples)), examples.labels))
            parts[-1].scores[f"{part}_majority"] = majority(task, trained.labels, examples.labels)
            if len(examples) <= MOST_INT8 and spec.precision == "float32":
                outputs = outputs_of(quantised(model), examples, len(examples))
                parts.append(int8_evaluation(task, part, outputs, examples.labels))
        return merged(parts)

    def score(model: nn.Module, count: int) -> dict[str, float]:
        part, examples = next(iter(scored.items()))
        outputs = outputs_of(model, examples, min(count, len(examples)))
        return {f"{part}_score": scores(task, outputs.numpy(), examples.labels[:count])[task.metrics[0]]}

    def sample(part: str, count: int) -> dict[str, Tensor]:
        return ({**scored, "train": trained})[part].batch(range(count), device)

    steps_per_epoch = len(trained) // spec.batch_size  # an incomplete last batch is left out
    return Task(
        model=model,
        loss_fn=lambda model, batch: loss_of(forward(model, batch), batch["labels"]),
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        evaluate=evaluate,
        score=score,
        sample=sample,
        data=data,
    )


def encoder(spec: Network, task: TextSet) -> tuple[Any, transformers.PreTrainedModel, str]:
    """Tokenizer, model and origin for a spec; the model's head is drawn from torch's global generator.

    Raises:
        DataError: if they are unavailable or do not match the spec; the message says what to do.
    """
    folder, origin = _checkpoint(spec.model)
    place = str(folder or spec.model)
    options = {"local_files_only": True} if folder is None and not glue_files.hub_answers() else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        config = transformers.AutoConfig.from_pretrained(place, num_labels=task.outputs, **options)
        config = with_dropout(config, spec)
        _fit(spec, config, tokenizer)
        kind = {"attn_implementation": spec.attention, "dtype": torch.float32}
        pretrained, loading = transformers.AutoModel.from_pretrained(
            place, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kind, **options
        )
    except Exception as error:  # a damaged file can make the libraries raise anything
        if isinstance(error, DataError):
            raise
        raise _unavailable(spec.model, error) from error
    wrong = [
        str(key) for name in ("missing_keys", "mismatched_keys") for key in loading[name] if "pooler" not in str(key)
    ]
    if wrong:
        raise DataError(
            f"The weights of {spec.model} do not match its config.json ({len(wrong)} differ, for example {wrong[0]}): "
            "put weights and config.json of the same model there."
        )
    model = transformers.AutoModelForSequenceClassification.from_config(config, **kind)
    model.base_model.load_state_dict(pretrained.state_dict(), strict=False)  # the classes differ in their poolers
    if spec.dropout is not None and (other := {m.p for m in model.modules() if type(m) is nn.Dropout} - {spec.dropout}):
        raise DataError(
            f"dropout is {spec.dropout}, but {spec.model} has layers with {other}, which its configuration sets under "
            "another name: leave dropout out, and set it in config.json."
        )
    return tokenizer, model, origin


def with_dropout(config: Any, spec: Network) -> Any:
    """A transformers configuration with the spec's dropout."""
    if spec.dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            setattr(config, name, spec.dropout)
    return config


def check(spec: Network, data_root: Path | None = None) -> None:
    """Check before any training that a spec's data, tokenizer and model are available and match.

    Raises:
        DataError: if they do not match; `DataUnavailable` if no source has the data.
    """
    load(spec.dataset, data_root)
    _, model, _ = encoder(spec, text_set(spec.dataset))
    load_start(spec, model)


class _Examples(Protocol):
    labels: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int: ...

    def by_length(self) -> list[int]: ...

    def batch(self, chosen: Sequence[int], device: torch.device) -> dict[str, Tensor]: ...


class _Encoded:
    """Tokenized texts, which are padded into batches on demand."""

    def __init__(self, examples: Texts, tokenizer: Any, max_length: int) -> None:
        self.labels = examples.labels
        self.targets = _targets(examples)
        self._tokenizer = tokenizer
        columns = [list(texts_) for texts_ in examples.sentences]
        self._tokens = tokenizer(*columns, truncation=True, max_length=max_length)

    def __len__(self) -> int:
        return len(self.labels)

    def by_length(self) -> list[int]:
        """All examples, shortest first, so that batches need little padding."""
        return sorted(range(len(self)), key=lambda i: len(self._tokens["input_ids"][i]))

    def batch(self, chosen: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """These examples, padded to the longest of them, so that all micro-batches have equal shapes."""
        rows = {name: [values[i] for i in chosen] for name, values in self._tokens.items()}
        padded = self._tokenizer.pad(rows, return_tensors="pt")
        labels = torch.from_numpy(self.targets[list(chosen)])
        return {name: to_device(tensor, device) for name, tensor in {**padded, "labels": labels}.items()}


class _Fixed:
    """Tokenized texts, all padded to one length, on the device: a batch is a selection, without work on the host."""

    def __init__(self, examples: Texts, tokenizer: Any, max_length: int, device: torch.device) -> None:
        self.labels, self.targets = examples.labels, _targets(examples)
        columns = [list(texts_) for texts_ in examples.sentences]
        tokens = tokenizer(*columns, truncation=True, max_length=max_length, padding="max_length", return_tensors="pt")
        tensors = {**tokens, "labels": torch.from_numpy(self.targets)}
        self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    def __len__(self) -> int:
        return len(self.labels)

    def by_length(self) -> list[int]:
        """All examples, in order: they are equally long."""
        return list(range(len(self)))

    def batch(self, chosen: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """These examples."""
        index = to_device(torch.tensor(chosen), device)
        return {name: tensor[index] for name, tensor in self._tensors.items()}


def encoded(spec: Network, examples: Texts, tokenizer: Any) -> "_Encoded | _Fixed":
    """The examples as tokens, padded as the spec says."""
    if spec.padding == "max_length":
        return _Fixed(examples, tokenizer, spec.max_length, torch.device(spec.device))
    return _Encoded(examples, tokenizer, spec.max_length)


def _targets(examples: Texts) -> np.ndarray:
    """Classes as they are, values as float32."""
    return examples.labels if examples.labels.dtype == np.int64 else examples.labels.astype(np.float32)


def checksum(model: transformers.PreTrainedModel) -> str:
    """sha256 over the encoder's weights, without the head."""
    digest = hashlib.sha256()
    for name, tensor in model.base_model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checkpoint(model: str) -> tuple[Path | None, str]:
    """The folder of a checkpoint (None for a model of the hub), and its origin in words."""
    if model == "minilm":
        return glue_files.minilm(), glue_files.MINILM
    if model in MODELS:
        return None, f"{model} from the hub"
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} has no checkpoint (no config.json): name a folder in transformers' layout.")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise DataError(  # transformers would create an empty one
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZERS)}): put the model's tokenizer there."
        )
    return folder, f"the folder {folder.name}"


def _fit(spec: Network, config: Any, tokenizer: Any) -> None:
    """Reject a max_length beyond the model's positions, and a tokenizer with more tokens than the model."""
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"The tokenizer of {spec.model} has {len(tokenizer)} tokens, but the model has {config.vocab_size}: put "
            "the tokenizer and weights of the same model there."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if config.model_type in ("roberta", "xlm-roberta"):
        positions -= config.pad_token_id + 1  # RoBERTa's positions start after the padding token
    if spec.max_length > positions:
        raise DataError(
            f"max_length is {spec.max_length}, but {spec.model} takes at most {positions} tokens: lower max_length."
        )


def _unavailable(model: str, error: Exception) -> DataError:
    message = [*str(error).strip().splitlines(), type(error).__name__][0]
    return DataError(
        f"The model or tokenizer of {model} is not available ({message[:200]}): name a folder with config.json, the "
        "weights and the tokenizer's files, or run once with a network."
    )
