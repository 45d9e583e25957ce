"""Attention backward for Blackwell: the main kernel. What comes before and after it, others have."""
