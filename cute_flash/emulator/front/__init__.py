"""The way in for kernels from anywhere: call them, try them in many orders of events, get a verdict."""
