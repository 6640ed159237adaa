"""What every package needs: errors, files, the registry of kinds, and the command line."""
