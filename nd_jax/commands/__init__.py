"""The verbs of the command line, a file for each. Their signatures are their options: names, types, defaults, help.

What takes long to import is imported where it is used, so that help and bad input are answered at once.
"""
