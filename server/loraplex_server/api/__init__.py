"""HTTP: the only place it exists."""
