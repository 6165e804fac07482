"""How fast a program can be at most, how fast it is, and a record of it."""
