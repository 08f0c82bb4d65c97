"""Model families, one per file: `FAMILY` in each, listed in `lowrank.pretrained.families`."""
