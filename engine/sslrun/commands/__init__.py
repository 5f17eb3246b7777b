"""The verbs of the command line: parsers and the calls they lead to, one file per room that the verbs are about."""
