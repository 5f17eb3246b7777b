"""Optimizers, parameter groups and learning-rate schedules. Importing this package registers all of them."""

from sslrun.optim import policies
from sslrun.optim.optimizers import GradClip, Optimizer
from sslrun.optim.schedules import Schedule, learning_rates, weight_decays

__all__ = ["GradClip", "Optimizer", "Schedule", "learning_rates", "policies", "weight_decays"]
