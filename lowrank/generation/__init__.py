"""Text from a model: batched prefill and decoding with a key-value cache, sampling, and prompt batches."""
