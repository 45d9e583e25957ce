"""One wave: threads, registers, memories, what is pending or parked, and hooks for those who look on."""
