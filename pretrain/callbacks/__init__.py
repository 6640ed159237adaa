"""What happens beside training: files, TensorBoard, progress bar.

Each is small and sees the same rows.
"""
