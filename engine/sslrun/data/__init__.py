"""From files to batches: sources, order, draws, transforms, DALI and the exact stage. The only room that knows DALI."""
