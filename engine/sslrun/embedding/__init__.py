"""Vectors of images by a trained encoder: in memory, in files, and the images that are nearest to one."""
