"""The study of wrong training labels."""

from analysis.exhibits.studies import against, study

EXHIBIT = study(
    "label_noise",
    "Accuracy with wrong training labels",
    draw=against("label_noise", "share of wrong training labels (learning rate and rho chosen for each)"),
    place=90,
)
