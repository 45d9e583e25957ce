"""What needs nothing of the machine: errors, options, number formats, fragments of matrices."""
