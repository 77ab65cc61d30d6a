"""The exhibits: a module for each table of the paper and each study, with its numbers, its words and its figures."""
