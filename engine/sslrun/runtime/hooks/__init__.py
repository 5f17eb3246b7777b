"""Log hooks: further places that the rows of a run go to, beside metrics.jsonl.

To add one, write a class like those in this folder and name it in `log.hooks` (docs/add-a-metric.md).
"""
