"""Text tasks on tiny checkpoints in the hub's folder layout: metrics by hand, padding, and the spec's fields."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

import msam
from experiments.harness.runs import catalogue
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import SpecError, Training
from experiments.harness.tasks import text_scores, texts
from experiments.harness.tasks.build import build_task
from experiments.harness.tasks.glue_files import TASKS
from experiments.harness.tasks.storage import DataError
from experiments.harness.work.session import Interrupted, Session
from experiments.harness.work.train import build_optimizer, schedule, train
from tests.experiments.tasks.test_glue_files import all_texts, columns_of, write

pytestmark = pytest.mark.usefixtures("dozens")

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny random BERT with a word-level tokenizer, saved in the hub's layout."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in all_texts() for word in text.split()})]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """A tiny random RoBERTa with a byte-level tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("roberta")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(all_texts(), 400, 1, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    trained._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, type_vocab_size=1, **SMALL)
    RobertaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        if task != "snippets":
            write(folder, task)
    return folder


def spec(model: Path, dataset: str = "rte", **changes) -> Training:
    return Training(
        **{
            "profile": "smoke",
            "dataset": dataset,
            "model": str(model),
            "base_optimizer": "adamw",
            "learning_rate": 1e-3,
            "train_examples": 12,
            "epochs": 2,
            "batch_size": 6,
            "max_length": 32,
            "schedule": "linear",
            "decay": "matrices",
            **changes,
        }
    )


@pytest.mark.parametrize("dataset", [name for name in TASKS if name != "snippets"])
def test_every_task_trains_and_is_scored(dataset, bert, data, tmp_path):
    run = spec(bert, dataset, rho=0.05, micro_batches=3, clip_norm=1.0)
    train(run, Session(tmp_path, data_root=data))
    summary = record_of(run, tmp_path).summary()
    parts = ["test", "test_mismatched"] if dataset == "mnli" else ["test"]
    for part in parts:
        for metric in TASKS[dataset].metrics:
            assert -1 <= summary[f"{part}_{metric}"] <= 1
        assert summary[f"{part}_score"] == summary[f"{part}_{TASKS[dataset].metrics[0]}"]
        assert summary[f"{part}_loss"] > 0
    assert record_of(run, tmp_path).environments()[0]["weights_source"].startswith("the folder bert")


@pytest.mark.parametrize("dataset", ["sst2", "rte", "stsb"])
def test_roberta_too(dataset, roberta, data, tmp_path):
    run = spec(roberta, dataset, rho=0.05, micro_batches=2)
    train(run, Session(tmp_path, data_root=data))
    assert -1 <= record_of(run, tmp_path).summary()["test_score"] <= 1


# Five answers, by hand. Labels 1 1 0 0 1, predictions 1 0 0 1 1: two of three ones are right, and one of two zeros.
LABELS = np.array([1, 1, 0, 0, 1])
LOGITS = np.array([[0, 2], [1, 0], [3, 1], [0, 1], [-1, 4]], dtype=float)


def test_metrics_by_hand():
    accuracy = 3 / 5
    f1 = 2 * 2 / (2 * 2 + 1 + 1)  # 2 true positives, 1 false positive, 1 false negative
    matthews = (2 * 1 - 1 * 1) / np.sqrt((2 + 1) * (2 + 1) * (1 + 1) * (1 + 1))
    assert text_scores.scores(TASKS["mrpc"], LOGITS, LABELS) == pytest.approx({"accuracy": accuracy, "f1": f1})
    assert text_scores.scores(TASKS["qqp"], LOGITS, LABELS) == pytest.approx({"accuracy": accuracy, "f1": f1})
    assert text_scores.scores(TASKS["cola"], LOGITS, LABELS) == pytest.approx({"matthews_correlation": matthews})
    for name in ("sst2", "qnli", "rte", "wnli"):
        assert text_scores.scores(TASKS[name], LOGITS, LABELS) == pytest.approx({"accuracy": accuracy})
    three = np.eye(3)[[0, 2, 1, 1]]
    assert text_scores.scores(TASKS["mnli"], three, np.array([0, 2, 1, 0])) == pytest.approx({"accuracy": 3 / 4})


def test_correlations_by_hand():
    """1 2 3 4 against 1 3 2 10: covariance 3.25, deviations sqrt(1.25) and sqrt(12.5); ranks differ by one twice."""
    scores = text_scores.scores(TASKS["stsb"], np.array([[1.0], [3.0], [2.0], [10.0]]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert scores["pearson"] == pytest.approx(3.25 / np.sqrt(1.25 * 12.5))
    assert scores["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert scores["pearson"] == pytest.approx(stats.pearsonr([1, 3, 2, 10], [1, 2, 3, 4]).statistic)


def test_a_constant_answer_has_no_correlation_and_no_warning():
    assert text_scores.scores(TASKS["stsb"], np.ones((4, 1)), np.arange(4.0)) == {"pearson": 0, "spearman": 0}
    assert text_scores.scores(TASKS["cola"], np.array([[0.0, 1.0]] * 5), LABELS) == {"matthews_correlation": 0}


def test_the_majority_score_predicts_the_most_frequent_training_label():
    trained = np.array([0, 0, 1])
    assert text_scores.majority(TASKS["rte"], trained, LABELS) == pytest.approx(2 / 5)
    assert text_scores.majority(TASKS["cola"], trained, LABELS) == 0
    assert text_scores.majority(TASKS["stsb"], np.arange(4.0), np.arange(4.0)) == 0


def test_micro_batches_have_equal_shapes_and_padding_changes_no_loss(bert, data):
    task = build_task(spec(bert), str(data))
    task.model.eval()
    batch = next(task.batches(0, 0))
    shapes = {part["input_ids"].shape for part in msam.split(batch, 3)}
    assert shapes == {(2, batch["input_ids"].shape[1])}
    wider = {
        name: nn.functional.pad(t, (0, 5)) if t.ndim == 2 else t  # [PAD] is 0, and so is its mask
        for name, t in batch.items()
    }
    torch.testing.assert_close(task.loss_fn(task.model, wider), task.loss_fn(task.model, batch))


def test_texts_of_one_length_are_the_same_texts_and_their_batches_have_one_shape(bert, data):
    """Same order, same loss as padded to the longest, same scores."""
    longest, fixed = (build_task(spec(bert, padding=padding), str(data)) for padding in ("longest", "max_length"))
    fixed.model.load_state_dict(longest.model.state_dict())
    for task in (longest, fixed):
        task.model.eval()
    pairs = list(zip(longest.batches(1, 0), fixed.batches(1, 0), strict=True))
    assert {batch["input_ids"].shape for _, batch in pairs} == {(6, 32)}
    for one, other in pairs:
        length = one["input_ids"].shape[1]
        assert all(torch.equal(other[name][:, :length], one[name]) for name in one if name != "labels")
        torch.testing.assert_close(fixed.loss_fn(fixed.model, other), longest.loss_fn(longest.model, one))
    assert fixed.evaluate().scores == pytest.approx(longest.evaluate().scores, rel=1e-5)


def test_the_head_is_paired_by_seed_and_batches_do_not_depend_on_the_method(bert, data):
    def first(run: Training):
        torch.manual_seed(run.seed)
        task = build_task(run, str(data))
        return task.model.classifier.weight, [b["input_ids"] for b in task.batches(1, 0)]

    sgd, msam_ = first(spec(bert)), first(spec(bert, rho=0.1, micro_batches=3))
    assert torch.equal(sgd[0], msam_[0])
    assert all(torch.equal(a, b) for a, b in zip(sgd[1], msam_[1], strict=True))
    assert not torch.equal(sgd[0], first(spec(bert, seed=1))[0])


def test_dropout_attention_and_decay_are_the_specs(bert, data):
    task = build_task(spec(bert, dropout=0.3, attention="sdpa"), str(data))
    rates = {m.p for m in task.model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.3}
    assert task.model.config._attn_implementation == "sdpa"
    optimizer = build_optimizer(spec(bert, weight_decay=0.1), task.model)
    decayed, spared = (group["params"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    names = {id(p): name for name, p in task.model.named_parameters()}
    assert all("LayerNorm" in names[id(p)] or names[id(p)].endswith("bias") for p in spared)
    assert not any("LayerNorm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed)
    assert len(decayed) + len(spared) == len(names)


def test_the_linear_schedule_warms_up_and_ends_at_zero():
    factor = schedule(replace(spec(Path("/x")), epochs=4, warmup_epochs=1.0), 5)
    assert [factor(step) for step in (0, 4, 5, 20)] == pytest.approx([1 / 6, 5 / 6, 1, 0])
    assert factor(10) - factor(11) == pytest.approx(1 / 15)


def words_of(batch, folder) -> list[str]:
    """A batch's texts, decoded by the tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)


def test_held_out_rows_are_scored_and_never_trained_on(bert, data, tmp_path):
    """The first six of the fixed permutation are trained on; the final weights are scored on the last four."""
    run = spec(bert, "sst2", train_examples=6, holdout_examples=4)
    order = np.random.default_rng(0).permutation(12)
    rows = columns_of("sst2")
    torch.manual_seed(0)
    task = build_task(run, str(data))
    seen = {text for batch in task.batches(0, 0) for text in words_of(batch, bert)}
    assert seen == {rows["sentence"][i] for i in order[:6]}
    train(run, Session(tmp_path, data_root=data))
    summary = record_of(run, tmp_path).summary()
    assert not any(name.startswith("test") for name in summary)
    task.model.load_state_dict(torch.load(record_of(run, tmp_path).checkpoint, weights_only=True)["model"])
    assert summary["holdout_score"] == own_accuracy(
        task, bert, [rows["sentence"][i] for i in order[-4:]], [rows["label"][i] for i in order[-4:]]
    )


def own_accuracy(task, folder, *columns_and_labels) -> float:
    from transformers import AutoTokenizer

    *columns, labels = columns_and_labels
    tokens = AutoTokenizer.from_pretrained(folder)(*columns, padding=True, return_tensors="pt")
    task.model.eval()
    with torch.no_grad():
        predicted = task.model(**tokens).logits.argmax(1)
    return (predicted == torch.tensor(labels)).float().mean().item()


def test_matched_and_mismatched_are_scored_on_their_splits(bert, data):
    torch.manual_seed(0)
    task = build_task(spec(bert, "mnli"), str(data))
    with torch.no_grad():  # a model whose answers depend on the text
        task.model.classifier.weight.mul_(50)
    scores = task.evaluate().scores
    for part, split in (("test", "validation_matched"), ("test_mismatched", "validation_mismatched")):
        rows = columns_of("mnli", split)
        expected = own_accuracy(task, bert, rows["premise"], rows["hypothesis"], rows["label"])
        assert scores[f"{part}_accuracy"] == pytest.approx(expected)
    kept = task.evaluate().predictions
    assert set(kept) == {f"test{a}{b}" for a in ("", "_mismatched") for b in ("", "_labels", "_int8")}
    for part in ("test", "test_mismatched"):
        right = kept[part] == kept[f"{part}_labels"]
        assert scores[f"{part}_accuracy"] == right.mean()
        assert scores[f"{part}_int8_accuracy"] == (kept[f"{part}_int8"] == kept[f"{part}_labels"]).mean()
    first = {name: values[:3] for name, values in columns_of("mnli", "validation_matched").items()}
    expected = own_accuracy(task, bert, first["premise"], first["hypothesis"], first["label"])
    assert task.score(task.model, 3) == {"test_score": pytest.approx(expected)}


def test_a_quantised_layer_rounds_weights_and_inputs_to_int8():
    """Each in its own range: weights symmetrically to 255 steps, inputs to 256 or, without overflow, to 128."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.GELU())
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(64, 32)
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    with torch.no_grad():
        outputs = text_scores.quantised(model)(x)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    step = 2 * weight.abs().max() / 255
    rounded = (weight / step).round().clamp(-128, 127) * step
    errors = []
    for levels in (255, 127):
        grid = (x.max() - x.min()) / levels
        errors.append((nn.functional.gelu((x / grid).round() * grid @ rounded.T + bias) - outputs).abs().max())
    exact = nn.functional.gelu(x @ weight.T + bias)
    assert min(errors) < 0.5 * (outputs - exact).abs().max() < 0.05


def test_a_regression_keeps_its_values_and_is_scored_after_quantisation(bert, data):
    torch.manual_seed(0)
    task = build_task(spec(bert, "stsb"), str(data))
    evaluation = task.evaluate()
    values = evaluation.predictions
    assert {array.dtype for array in values.values()} == {np.dtype(np.float32)}
    assert evaluation.scores["test_pearson"] == pytest.approx(
        stats.pearsonr(values["test"], values["test_labels"]).statistic, abs=1e-5
    )
    assert evaluation.scores["test_int8_score"] == evaluation.scores["test_int8_pearson"]
    assert not any("ece" in name for name in evaluation.scores)


def test_the_encoder_comes_from_the_checkpoint_and_the_head_from_the_seed(bert, data, tmp_path):
    """Even if the checkpoint has a head of the right size, since that head was tuned before."""
    from transformers import AutoTokenizer

    config = BertConfig.from_pretrained(bert, num_labels=2)
    BertForSequenceClassification.from_pretrained(bert, config=config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_task(spec(tmp_path), str(data)).model)
    saved = BertModel.from_pretrained(bert)
    for model in models:
        assert torch.equal(
            model.bert.encoder.layer[0].attention.self.query.weight, saved.encoder.layer[0].attention.self.query.weight
        )
        assert torch.equal(model.bert.pooler.dense.weight, saved.pooler.dense.weight)
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)
    assert not torch.equal(models[0].classifier.weight, models[2].classifier.weight)
    with torch.no_grad():
        models[0].bert.embeddings.word_embeddings.weight[0] += 1
    assert texts.checksum(models[0]) != texts.checksum(models[1]) == texts.checksum(models[2])


def test_checkpoints_that_do_not_match_are_rejected_before_training(bert, data, tmp_path):
    with pytest.raises(DataError, match="takes at most 40 tokens: lower max_length"):
        texts.check(spec(bert, max_length=41), str(data))
    with pytest.raises(DataError, match=r"no config\.json"):
        texts.check(spec(tmp_path / "none"), str(data))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((bert / "config.json").read_text())
    with pytest.raises(DataError, match="has no tokenizer"):
        texts.check(spec(bare), str(data))
    mixed = shutil.copytree(bert, tmp_path / "mixed")
    content = json.loads((bert / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps({**content, "hidden_size": 32}))
    with pytest.raises(DataError, match=r"The weights of .* do not match its config"):
        texts.check(spec(mixed), str(data))
    (mixed / "config.json").write_text(json.dumps({**content, "vocab_size": 20}))
    with pytest.raises(DataError, match="tokens, but the model has 20"):
        texts.check(spec(mixed), str(data))
    (mixed / "config.json").write_text(json.dumps(content))
    (mixed / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="is not available"):
        texts.check(spec(mixed), str(data))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augmentation": "crop-flip"}, "left out, except for images"),
        ({"dataset": "stsb", "label_smoothing": 0.1}, "a regression"),
        ({"model": "resnet8"}, "for rte, or the path of a checkpoint's folder"),
        ({"dataset": "cifar10", "model": "minilm"}, "model is 'minilm'"),
    ],
)
def test_specs_that_do_not_fit_texts_are_rejected(changes, words):
    with pytest.raises(SpecError, match=words):
        replace(spec(Path("/x")), **changes)


def test_roberta_counts_its_positions_from_the_padding(roberta, data):
    texts.check(spec(roberta, max_length=38), str(data))
    with pytest.raises(DataError, match="at most 38 tokens"):
        texts.check(spec(roberta, max_length=39), str(data))


def test_every_cell_of_the_paper_profile_is_a_model_of_the_published_size():
    """Built on the meta device from the published configurations, which are the defaults of the classes."""
    parameters = {}
    for name in ("bert_glue", "roberta_glue"):
        for cell in catalogue.cells(name, "paper"):
            classes = max(1, len(TASKS[cell.dataset].labels))
            if (cell.model, classes) in parameters:
                continue
            with torch.device("meta"):
                if cell.model == "bert-base-uncased":
                    model = BertForSequenceClassification(BertConfig(num_labels=classes))
                else:
                    config = RobertaConfig(
                        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=classes
                    )
                    model = RobertaForSequenceClassification(config)
            parameters[cell.model, classes] = sum(p.numel() for p in model.parameters())
            build_optimizer(cell, model)
    assert parameters["bert-base-uncased", 2] == 109_483_778
    assert parameters["roberta-base", 2] == 124_647_170
    assert len(parameters) == 6


def test_a_text_run_resumes_bit_for_bit(bert, data, tmp_path):
    run = spec(bert, rho=0.05, micro_batches=3, dropout=0.2)
    train(run, Session(tmp_path / "whole", data_root=data))
    stop = iter([False, False, True])
    with pytest.raises(Interrupted):
        train(run, Session(tmp_path / "parts", data_root=data, stop=lambda: next(stop)))
    train(run, Session(tmp_path / "parts", data_root=data))
    summaries = [
        json.loads((r / "runs" / run.run_id / "summary.json").read_text())
        for r in (tmp_path / "whole", tmp_path / "parts")
    ]
    for summary in summaries:
        summary.pop("wall_seconds"), summary.pop("step_seconds")
    assert summaries[0] == summaries[1]


FULL_SIZE = """
import resource, torch, msam
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification
torch.set_num_threads(2)
torch.manual_seed(0)
roberta = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
model = {"bert": lambda: BertForSequenceClassification(BertConfig()),
         "roberta": lambda: RobertaForSequenceClassification(roberta)}[NAME]()
batch = {"input_ids": torch.randint(10, 30000, (32, 128)), "labels": torch.randint(0, 2, (32,))}
step = msam.backward(lambda part: model(**part).loss, batch, model, rho=0.01, micro_batches=4)
assert all(p.grad is not None and torch.isfinite(p.grad).all() for n, p in model.named_parameters())
assert step.sharpness > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.rare
@pytest.mark.parametrize("name", ["bert"])  # RoBERTa-base is checked by hand with `experiments check`
def test_a_step_at_full_size_fits_into_20_gib(name):
    """Random weights of the published configuration, batch 32 of 128 tokens, m = 4."""
    done = subprocess.run(
        [sys.executable, "-c", f"NAME = {name!r}{FULL_SIZE}"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_curvature_of_an_encoder_is_measured(attention, bert, data, tmp_path):
    """Dropout is off, padding is masked, and fused attention is differentiated twice."""
    from experiments.harness.runs.grids import curvature_of
    from experiments.harness.work.execute import execute

    run = spec(bert, "rte", attention=attention, seed=1)
    (measured,) = curvature_of([run], examples=8, rho=0.01)
    execute(measured, Session(tmp_path, data_root=data))
    summary = record_of(measured, tmp_path).summary()
    assert summary["train_lambda_1"] > summary["train_lambda_5"] > 0
    assert summary["train_residual"] < 1e-3
    task = build_task(run, str(data))
    task.model.load_state_dict(torch.load(record_of(run, tmp_path).checkpoint, weights_only=True)["model"])
    with torch.no_grad():
        loss = task.loss_fn(task.model.eval(), task.sample("train", 8)).item()
    assert summary["train_loss"] == pytest.approx(loss, rel=1e-6)
