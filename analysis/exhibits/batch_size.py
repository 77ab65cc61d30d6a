"""The study of the batch size."""

from analysis.exhibits.studies import against, study

EXHIBIT = study(
    "batch_size",
    "Accuracy against the batch size",
    draw=against("batch_size", "batch size (learning rate in proportion)", logarithmic=True),
    place=80,
)
