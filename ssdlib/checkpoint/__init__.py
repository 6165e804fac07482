"""Files in and out: weights, configurations, tokenizers, and where they come from."""
