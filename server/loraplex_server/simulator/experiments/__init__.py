"""Named experiments: each states its parameters, runs, and reports tables and checks."""
