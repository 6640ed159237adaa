"""What a trained model is worth: perplexity on held-out text, a bigram to compare with, and
generated text.
"""
