"""Attention backward for Hopper: the main kernel. What comes before and after it, others have."""
