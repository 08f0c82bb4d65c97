"""Whether fine-tuning teaches a model to answer in a format: text in, JSON out."""
