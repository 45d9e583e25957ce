"""Changes to our kernels that the emulator must notice: what is changed, where, what is harmless."""
