"""What XLA makes of a program for a chip, attached or absent."""
