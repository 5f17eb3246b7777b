"""Checks layer sizes."""


def require_positive(**sizes: int) -> None:
    """Raises ValueError for the first size below 1, since torch accepts layers of 0 channels."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected 1 or more")
