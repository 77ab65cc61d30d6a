"""The study of rho: accuracy of SAM and mSAM against rho."""

from analysis.exhibits.studies import against, study

against_rho = against("rho", "rho", logarithmic=True)

EXHIBIT = study("rho", "Accuracy against rho", draw=against_rho, place=70)
