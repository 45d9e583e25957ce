"""Who may see whose writes: the race detectors for shared and tensor memory."""
