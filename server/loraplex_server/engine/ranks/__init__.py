"""One replica over several processes: each rank computes its part of every step (decision 26)."""
