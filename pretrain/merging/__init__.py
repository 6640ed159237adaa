"""What is done to weights between two trainings: averages, upcycling, fewer experts.

Each result is compared with what it came from.
"""
