"""Arithmetic and words that need nothing of the machine: errors, number formats, fragments of matrices."""
