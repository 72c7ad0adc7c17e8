"""Who serves a request: one small object per policy, the same for every simulated fleet."""
