"""Section 2 of the paper: teachers into a store, the store into a student."""
