"""What is known of data sets and models before any of them is there: sizes, metrics, names. Standard library only."""

IMAGES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}
"""Training and test examples of each set of images."""

TEXTS = {
    "cola": (8_551, 1_043),
    "sst2": (67_349, 872),
    "mrpc": (3_668, 408),
    "stsb": (5_749, 1_500),
    "qqp": (363_846, 40_430),
    "mnli": (392_702, 9_815),
    "qnli": (104_743, 5_463),
    "rte": (2_490, 277),
    "wnli": (635, 71),
    "snippets": (8_072, 2_000),
}
"""Training and test examples of each set of texts: GLUE's tasks, whose test part here is the validation split (the
labels of the real one are withheld; of MNLI the matched part), and the movie snippets of `tasks/glue_files.py`."""

GLUE_GRIDS = {
    "cola": (None, 1_000),
    "sst2": (None, 5_000),
    "mrpc": (None, 500),
    "stsb": (None, 1_000),
    "qqp": (20_000, 5_000),
    "mnli": (20_000, 5_000),
    "qnli": (20_000, 5_000),
    "rte": (None, 500),
    "wnli": (None, 100),
}
"""GLUE's tasks in the order of Table 2: how many training examples a grid trains on (None: all others) and how many it
holds out. The three large tasks choose on a part of theirs: a grid on all of MNLI would cost more than the table."""

SIMULATED = {"interpolation": (2**20, 0)}
"""Data that a theory run draws itself, of any size."""

METRICS = {
    "cola": "Matthews correlation",
    "stsb": "Pearson correlation",
} | dict.fromkeys(("sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli", "snippets"), "accuracy")
"""What a text task's score is: the first of its official metrics."""

IMAGE_MODELS = (
    *("linear", "resnet8", "resnet8-groupnorm", "resnet20", "resnet50"),
    *("wrn-10-1", "wrn-28-10", "vit-micro", "vit-small"),
)
TEXT_MODELS = ("minilm", "bert-base-uncased", "roberta-base")
"""And any folder with a checkpoint of transformers, whose path holds a slash."""
SIMULATED_MODELS = ("regression", "two-layer")
