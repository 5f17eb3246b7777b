"""What is measured while training: one class per measurement, one file each, and `Monitors`, which runs them."""
