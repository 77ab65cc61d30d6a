"""The paper's experiments, one file each; `python -m experiments list` shows them."""
