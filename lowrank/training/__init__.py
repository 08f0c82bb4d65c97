"""A training run: a config becomes a checked run, which steps, saves, logs, scores and reports."""
