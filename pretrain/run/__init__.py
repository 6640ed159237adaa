"""What surrounds a training: its command line, its folder, its parts, a dry run, its outcome, the
LR finder.
"""
