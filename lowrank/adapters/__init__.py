"""Adapters on disk: trained leaves by name, the PEFT format, loading onto a base, and merging into a checkpoint."""
