"""What every layer asks of its sizes."""


def require_positive(**sizes: int) -> None:
    """Raises ValueError for the first size that is not above 0: torch makes layers of 0 channels without a word."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected 1 or more")
