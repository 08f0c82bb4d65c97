"""Training objectives: what a batch must hold, the loss as a sum and its weight, and how texts or labels are scored."""
