"""What everything else builds on: errors, files, the registry, sections of a recipe, the command
line, signals.
"""
