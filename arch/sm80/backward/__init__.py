"""The backward pass in sm_80 instructions."""
