"""Measurements during training: one file for each monitor, and `Monitors`, which runs them."""
