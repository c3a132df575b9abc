"""Moves bytes, batches, weights and metrics: everything that touches disk, devices or other processes."""
