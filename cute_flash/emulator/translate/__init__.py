"""From instructions to steps on sets of threads, and what is known of registers before they run."""
