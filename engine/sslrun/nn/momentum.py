"""The momentum teacher: a copy of a student that follows it slowly and gets no gradient."""

import copy
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def teacher_of(student: ModuleT) -> ModuleT:
    """An equal copy without gradients. The executor moves its parameters; its buffers are its own."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher
