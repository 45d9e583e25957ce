"""Units beside the threads: barriers, copies, clusters, warpgroup products, tensor memory and its mma."""
