"""Programs, who runs next, execution, and the boundary to a compiled kernel's host code."""
