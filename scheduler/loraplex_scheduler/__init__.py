"""What runs next: requests, budgets and plans. Pure Python: no tensors, no clock, no I/O."""
