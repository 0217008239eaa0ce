"""The verbs of the command, one a module.

Each module holds one ``click`` command named ``command``.  Nothing heavy is imported until a
verb runs.
"""
