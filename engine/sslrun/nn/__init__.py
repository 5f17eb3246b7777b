"""Networks and their parts. Importing the room makes every component in it known to configs."""

from sslrun.nn import heads, momentum, necks, norm, queue_and_bank, resnet, vit

__all__ = ["heads", "momentum", "necks", "norm", "queue_and_bank", "resnet", "vit"]
