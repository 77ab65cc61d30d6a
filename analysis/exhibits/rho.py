"""The study of rho: accuracy of SAM and mSAM against rho."""

from analysis.exhibits.studies import against, study

EXHIBIT = study("rho", "Accuracy against rho", draw=against("rho", "rho", logarithmic=True), place=70)
