"""Weights for others and from others: published files, exported encoders, imported backbones."""
