"""The ground that every room stands on: errors, types, trees, weights, sharding, config schema and files."""
