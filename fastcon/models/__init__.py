"""Networks with named heads, and how they are named on the command line."""
