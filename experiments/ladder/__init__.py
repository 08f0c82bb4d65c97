"""From a prompt to fine-tuning with retrieval on the same questions: whether form or facts were missing."""
