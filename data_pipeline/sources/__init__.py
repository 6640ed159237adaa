"""Where documents come from: ``config`` holds the kinds, and each kind has a file that reads it."""
