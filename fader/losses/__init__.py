"""Losses: pure functions of tensors, one paper's formula each. Half precision is widened first; float64 stays float64."""
