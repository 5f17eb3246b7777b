"""Training steps on fake CUDA tensors, on a machine and a torch without CUDA.

FakeTensorMode computes the shape, dtype, device and memory of every tensor and no numbers, so a whole optimizer step of
a recipe at its real size takes seconds on a CPU. A CPU build of torch lacks two things for CUDA tensors without
numbers: the C++ objects that autograd asks about the device (`played_cuda.cpp`), and a few functions of `torch.cuda`
(`played_torch_cuda.py`). `watch.py` counts what a step does. Everything here runs in processes of its own
(`processes.py`), because a process that believes in a GPU is of no use to other tests.

What it cannot show: numbers, times, what cuDNN chooses, races between streams, and whatever runs inside DALI, NCCL or
DeepSpeed.
"""
