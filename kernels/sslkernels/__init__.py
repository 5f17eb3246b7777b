"""Functions on tensors for the hot operations of self-supervised training. Knows nothing of sslrun; imports torch and
triton only. One file per operation; a kernel stays only with a benchmark row that pays for its lines."""
