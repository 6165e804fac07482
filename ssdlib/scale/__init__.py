"""One model on many devices."""
