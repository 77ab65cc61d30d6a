"""The recipes of Hugging Face's Trainer, trl's SFTTrainer and peft, on tiny models of their own libraries."""

import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.integrations.problems import IGNORED, Case, Recorder, clipped, in_bf16, recipe, reference

EXAMPLES, VOCABULARY, SMOOTHING = 8, 40, 0.1
"""Examples of a batch; words; label smoothing where it is on."""


def rows(count: int, labels: str) -> list[dict[str, Any]]:
    """Examples of very different lengths; their labels are the words themselves, some of them ignored, or classes."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for number in range(count):
        length = int(torch.randint(3, 15, (1,), generator=generator))
        words = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        prompt = number % 3
        target = words if labels == "words" else number % 2
        found.append({"input_ids": words, "labels": target})
        if labels == "words":
            found[-1]["labels"] = [IGNORED] * prompt + words[prompt:]
    return found


def padded(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator: pads on the right."""
    pad = lambda values, by: nn.utils.rnn.pad_sequence(list(map(torch.tensor, values)), True, by)  # noqa: E731
    labels = [example["labels"] for example in examples]
    return {
        "input_ids": pad([example["input_ids"] for example in examples], 0),
        "attention_mask": pad([[1] * len(example["input_ids"]) for example in examples], 0),
        "labels": pad(labels, IGNORED) if isinstance(labels[0], list) else torch.tensor(labels),
    }


def causal_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, bos_token_id=1, eos_token_id=1, **sizes)
    return LlamaForCausalLM(config)


def classifier() -> nn.Module:
    """Whose stock loss ignores num_items_in_batch."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes, **off))


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = causal_model()
    torch.manual_seed(1)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, adapters)


def words_loss(smoothing: float, model: nn.Module, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
    labels = part["labels"][:, 1:]
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing
    )
    return loss, labels.ne(IGNORED).sum()


def class_loss(model: nn.Module, part: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
    return F.cross_entropy(logits, part["labels"])


def batches_of(accumulate: int, labels: str) -> list[dict[str, Tensor]]:
    data = rows(EXAMPLES * accumulate, labels)
    return [padded(data[start : start + EXAMPLES]) for start in range(0, len(data), EXAMPLES)]


def expected(
    make, labels: str, accumulate: int, rho: float, clip: float | None = None, smoothing: float = 0.0
) -> Tensor:
    """Each batch counts by its labels."""
    batches = batches_of(accumulate, labels)
    if labels == "words":
        loss_of = functools.partial(words_loss, smoothing)
        counts = [int(batch["labels"][:, 1:].ne(IGNORED).sum()) for batch in batches]
    else:
        loss_of, counts = class_loss, [len(batch["labels"]) for batch in batches]
    return clipped(reference(make(), loss_of, batches, [count / sum(counts) for count in counts], rho), clip)


def arguments(folder: str, accumulate: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": 2,
        "per_device_train_batch_size": EXAMPLES,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "learning_rate": 0.0,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
    } | more


def trainer(make, labels: str, accumulate: int, rho: float | None, **more: Any) -> list[Tensor]:
    """Two steps over the same batches."""
    return fitted(make, labels, accumulate, rho, **more).optimizer_used.gradients


def fitted(make, labels: str, accumulate: int, rho: float | None, optimizer=Recorder, world: int = 1, **more: Any):
    from transformers import Trainer, TrainingArguments

    kind = recipe("Hugging Face Trainer", rho)["MSAMTrainer"] if rho is not None else Trainer
    model = make()
    used = optimizer([p for p in model.parameters() if p.requires_grad])
    with tempfile.TemporaryDirectory() as folder:
        made = kind(
            model,
            TrainingArguments(**arguments(folder, accumulate, **more)),
            train_dataset=2 * rows(EXAMPLES * accumulate * world, labels),
            data_collator=padded,
            optimizers=(used, torch.optim.lr_scheduler.ConstantLR(used, 1.0)),
        )
        if rho is None and labels == "classes":
            made.loss_is_scaled_for_ga = False  # BERT's classifier ignores num_items_in_batch
        made.train()
    made.optimizer_used = used
    return made


class ScheduleFree(Recorder):
    """An optimizer whose weights for training and for evaluation differ, as schedule-free ones' do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.mode = "eval"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def step(self, closure=None):
        assert self.mode == "train"
        return super().step(closure)


def schedule_free(make, labels: str, accumulate: int, rho: float | None) -> list[Tensor]:
    return fitted(make, labels, accumulate, rho, optimizer=ScheduleFree).optimizer_used.gradients


# trl


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))
    made.pad_token, made.eos_token = "w0", "w1"
    return made


def sft(accumulate: int, rho: float | None, **more: Any) -> list[Tensor]:
    return sft_fitted(accumulate, rho, **more).optimizer_used.gradients


def sft_fitted(accumulate: int, rho: float | None, **more: Any):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    kind = recipe("trl SFTTrainer", rho)["MSAMSFTTrainer"] if rho is not None else SFTTrainer
    model = causal_model()
    used = Recorder(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        made = kind(
            model,
            SFTConfig(**arguments(folder, accumulate, bf16=False, activation_checkpointing=False, **more)),
            train_dataset=Dataset.from_list(2 * rows(EXAMPLES * accumulate, "words")),
            processing_class=tokenizer(),
            optimizers=(used, torch.optim.lr_scheduler.ConstantLR(used, 1.0)),
        )
        made.train()
    made.optimizer_used = used
    return made


# peft


def peft_loop(accumulate: int, rho: float | None) -> list[Tensor]:
    """The plain loop of the recipe, one batch a step."""
    model = adapted()
    recorder = Recorder([p for p in model.parameters() if p.requires_grad])
    (batch,) = batches_of(1, "words")
    if rho is not None:
        recipe("peft", rho)["train_step"](model, batch, recorder)
    else:
        words_loss(0.0, model, batch)[0].backward()
        recorder.step()
    return recorder.gradients


def cases() -> Iterator[Case]:
    """Every recipe with 1 and with 4 accumulated batches."""
    part = functools.partial
    name, needs = "Hugging Face Trainer", ("accelerate",)
    for n in (1, 4):
        times = "accumulation 4" if n == 4 else "plain"
        for make, labels, what in ((classifier, "classes", "classification"), (causal_model, "words", "padded LM")):
            yield Case(name, f"{what}, {times}", needs, part(trainer, make, labels, n), part(expected, make, labels, n))
        words = (causal_model, "words", n)
        yield Case(
            name,
            f"label smoothing, {times}",
            needs,
            part(trainer, *words, label_smoothing_factor=SMOOTHING),
            part(expected, *words, smoothing=SMOOTHING),
        )
        yield Case(
            name,
            f"clipping, {times}",
            needs,
            part(trainer, *words, max_grad_norm=0.1),
            part(expected, *words, clip=0.1),
        )
        yield Case(name, f"optimizer.train(), {times}", needs, part(schedule_free, *words), part(expected, *words))
        yield Case("trl SFTTrainer", f"padded LM, {times}", (*needs, "trl"), part(sft, n), part(expected, *words))
        lora = (adapted, "words", n)
        yield Case("peft", f"LoRA in Trainer, {times}", (*needs, "peft"), part(trainer, *lora), part(expected, *lora))
    yield Case("peft", "LoRA, own loop", ("peft",), part(peft_loop, 1), part(expected, adapted, "words", 1))
    yield Case(
        name,
        "padded LM, bf16",
        needs,
        part(trainer, causal_model, "words", 1, bf16=True),
        part(in_bf16, causal_model, part(words_loss, 0.0), batches_of(1, "words")),
        in_bf16=True,
    )
