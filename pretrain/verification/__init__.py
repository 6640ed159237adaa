"""Proofs about a run: that a checkpoint resumes anywhere, and that a topology computes right."""
