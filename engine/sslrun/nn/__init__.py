"""Networks and their parts. Importing the room makes every component in it known to configs."""

from sslrun.nn import backbone, heads, memory, momentum, necks, norm, resnet, vit

__all__ = ["backbone", "heads", "memory", "momentum", "necks", "norm", "resnet", "vit"]
