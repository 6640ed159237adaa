"""What surrounds a training: command line, folder, parts, dry run, outcome, LR finder."""
