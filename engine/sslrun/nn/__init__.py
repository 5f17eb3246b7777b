"""Networks and their parts. Importing this package registers all of its components."""

from sslrun.nn import heads, momentum, necks, norm, queue_and_bank, resnet, vit

__all__ = ["heads", "momentum", "necks", "norm", "queue_and_bank", "resnet", "vit"]
