"""What is left of each task when adapters of several tasks are merged into one model, by every rule."""
