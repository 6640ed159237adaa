"""What happens next to training: files, TensorBoard, trackers, the progress bar.

Each callback is small, and all of them see the same records.
"""
