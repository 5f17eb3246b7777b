"""Networks and their parts. Importing the room makes every component in it known to configs."""

from sslrun.nn import heads, memory, momentum, necks, norm, resnet, vit

__all__ = ["heads", "memory", "momentum", "necks", "norm", "resnet", "vit"]
