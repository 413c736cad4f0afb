"""Where a run computes: devices, processes, clusters, and plans for them."""
