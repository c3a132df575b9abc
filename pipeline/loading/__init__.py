"""Batches: which records make one, decoded how, kept where."""
