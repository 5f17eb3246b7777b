"""The verbs of the command line: their parsers and implementations, grouped by subject."""
