"""What is known about each data set and model before anything is loaded: one row each. Standard library only.

To add a data set, add a row and the loader that it names. A model needs a row only if it has a short name: a spec may
also give `"module:callable"`.
"""

from dataclasses import dataclass

TASKS = "experiments.harness.tasks"

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
"""Of CIFAR-10's training pixels; CIFAR-100 is scaled the same way."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set: its sizes and its loader."""

    train: int
    """Training examples."""
    test: int
    """Test examples."""
    loader: str = ""
    """`"module:function"`; the function takes the set's name and a folder to search first, or None."""
    metric: str = "accuracy"
    """The name of the score in its table."""


@dataclass(frozen=True, kw_only=True)
class ImageSet(DataSet):
    """32 x 32 images with one label each. The loader returns `data.ImageData`."""

    classes: int
    mean: tuple[float, ...] = CIFAR_MEAN
    """Of the training pixels in [0, 1], by channel."""
    std: tuple[float, ...] = CIFAR_STD
    loader: str = f"{TASKS}.cifar:load_cifar"


@dataclass(frozen=True, kw_only=True)
class TextSet(DataSet):
    """Sentences, or pairs of them, each with a label or a value. The loader returns `glue_files.TextData`.

    The sizes of GLUE's tasks (Wang et al. 2019, arXiv 1804.07461) are those of the official training and validation
    splits. The validation split serves as the test set, because the labels of the official test set are withheld.
    """

    columns: tuple[str, ...] = ("sentence",)
    """The columns with the text: one sentence or two."""
    labels: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; none for a regression."""
    metrics: tuple[str, ...] = ("accuracy",)
    """The official metrics, as `texts.scores` computes them; the first is the score."""
    second: tuple[str, str] | None = None
    """The second official score: its name in a run's summary, and its name in words."""
    validation: tuple[str, ...] = ("validation",)
    empty: int = 0
    """Number of rows of the official training split whose text is empty; they are dropped."""
    rows: tuple[int, ...] = ()
    """Other training row counts that complete copies of the set have."""
    grid: tuple[int | None, int] | None = None
    """Number of training examples that a grid trains on (None: all that are not held out), and number held out. The
    three large tasks use a part of their data: a grid on all of MNLI would cost more than the table."""
    loader: str = f"{TASKS}.glue_files:load_texts"

    @property
    def outputs(self) -> int:
        """Outputs of a network: one per label, or one for a regression."""
        return max(1, len(self.labels))


@dataclass(frozen=True, kw_only=True)
class SimulatedSet(DataSet):
    """Data that a stability run draws itself, of any size."""


SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")

DATASETS: dict[str, DataSet] = {
    "cifar10": ImageSet(train=50_000, test=10_000, classes=10),
    "cifar100": ImageSet(train=50_000, test=10_000, classes=100),
    # GLUE, in the order of Table 2.
    "cola": TextSet(
        train=8_551,
        test=1_043,
        labels=("unacceptable", "acceptable"),
        metrics=("matthews_correlation",),
        metric="Matthews correlation",
        grid=(None, 1_000),
    ),
    "sst2": TextSet(train=67_349, test=872, labels=("negative", "positive"), grid=(None, 5_000)),
    "mrpc": TextSet(
        train=3_668,
        test=408,
        columns=SENTENCES,
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        second=("test_f1", "F1"),
        rows=(3_667,),  # some copies lack one row
        grid=(None, 500),
    ),
    "stsb": TextSet(
        train=5_749,
        test=1_500,
        columns=SENTENCES,
        metrics=("pearson", "spearman"),
        metric="Pearson correlation",
        second=("test_spearman", "Spearman correlation"),
        grid=(None, 1_000),
    ),
    "qqp": TextSet(
        train=363_846,
        test=40_430,
        columns=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        second=("test_f1", "F1"),
        empty=2,
        grid=(20_000, 5_000),
    ),
    "mnli": TextSet(
        train=392_702,
        test=9_815,  # the matched part
        columns=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        second=("test_mismatched_score", "accuracy on the mismatched part"),
        validation=("validation_matched", "validation_mismatched"),
        grid=(20_000, 5_000),
    ),
    "qnli": TextSet(
        train=104_743, test=5_463, columns=("question", "sentence"), labels=ENTAILMENT, grid=(20_000, 5_000)
    ),
    "rte": TextSet(train=2_490, test=277, columns=SENTENCES, labels=ENTAILMENT, grid=(None, 500)),
    "wnli": TextSet(train=635, test=71, columns=SENTENCES, labels=ENTAILMENT[::-1], grid=(None, 100)),
    "snippets": TextSet(
        train=8_072, test=2_000, labels=("negative", "positive"), loader=f"{TASKS}.glue_files:load_snippets"
    ),
    "interpolation": SimulatedSet(train=2**20, test=0),
}


@dataclass(frozen=True)
class Model:
    """A model that specs call by a short name."""

    of: type[DataSet]
    """The kind of data set that it takes."""
    parameters: float | None = None
    """Published parameter count, with the published rounding; None for our own small models."""
    source: str = ""
    """Who published that count."""
    guessed_speed: float = 400
    """Examples per second, forward and backward, on one GPU with TensorFloat-32: a guess for plans. ResNet-18 (batch
    512) and MiniLM (32 texts of 64 tokens) are the times of a captured step in one trial on an H200 (torch 2.11, this
    library at commit e423641); the others, of an A100-class GPU, are not measured. The default is for an encoder."""
    guessed_micro_batch: float = 0.0
    """Share of a captured step's time that each further micro-batch adds, from the same trial; a guess as well."""


MODELS = {
    "linear": Model(ImageSet),
    "resnet8": Model(ImageSet),
    "resnet8-groupnorm": Model(ImageSet),
    "resnet18": Model(ImageSet, 11.2e6, "torchvision's, with the stem of CIFAR and 10 classes", 37_600, 0.12),
    "resnet20": Model(ImageSet),
    "resnet50": Model(ImageSet, 23.5e6, "torchvision's, with the stem of CIFAR and 10 classes", 2500),
    "wrn-10-1": Model(ImageSet),
    "wrn-16-4": Model(ImageSet, guessed_speed=30_000, guessed_micro_batch=0.12),
    "wrn-28-10": Model(ImageSet, 36.5e6, "Zagoruyko and Komodakis 2016, table 4", 1200),
    "vit-micro": Model(ImageSet),
    "vit-tiny": Model(ImageSet, guessed_speed=25_000, guessed_micro_batch=0.07),
    "vit-small": Model(ImageSet, 6.3e6, "omihub777/ViT-CIFAR", 4000),
    "minilm": Model(TextSet, guessed_speed=10_000, guessed_micro_batch=0.1),
    "bert-base-uncased": Model(TextSet, 110e6, "Devlin et al. 2019, section 3"),
    "roberta-base": Model(TextSet, 125e6, "Liu et al. 2019, section 4.1"),
    "regression": Model(SimulatedSet),
    "two-layer": Model(SimulatedSet),
}
"""By name. A spec may also name a folder with a checkpoint (its path must contain a slash), or `"module:callable"`."""


GLUE_GRIDS = {name: data.grid for name, data in DATASETS.items() if isinstance(data, TextSet) and data.grid}
"""GLUE's tasks in the order of Table 2, each with its grid."""


def is_images(dataset: str) -> bool:
    """Whether a data set holds images."""
    return isinstance(DATASETS[dataset], ImageSet)


def image_set(dataset: str) -> ImageSet:
    """The facts about an image data set."""
    data = DATASETS[dataset]
    assert isinstance(data, ImageSet), f"{dataset} is not a set of images"
    return data


def text_set(dataset: str) -> TextSet:
    """The facts about a text data set."""
    data = DATASETS[dataset]
    assert isinstance(data, TextSet), f"{dataset} is not a set of texts"
    return data


def models_of(dataset: str) -> tuple[str, ...]:
    """The short names of the models that a data set's examples fit."""
    return tuple(name for name, model in MODELS.items() if isinstance(DATASETS[dataset], model.of))
