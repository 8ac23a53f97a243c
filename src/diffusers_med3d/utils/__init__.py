"""Writing files whole or not at all, seeds that depend on keys alone, hashes of contents."""
