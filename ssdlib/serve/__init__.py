"""What a cache of fixed size is good for: kept on disk, gone back to, run ahead of."""
