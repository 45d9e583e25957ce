"""Threads, registers and memories of a wave, what is pending or parked, and hooks for those who watch."""
