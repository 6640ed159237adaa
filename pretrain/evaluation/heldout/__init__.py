"""Loss on held-out text: perplexity, bits per byte, accuracy."""
