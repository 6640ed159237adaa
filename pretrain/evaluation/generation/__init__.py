"""Text generation: sampling, speculative decoding."""
