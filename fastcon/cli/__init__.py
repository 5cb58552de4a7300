"""The command line: parses, calls, prints. The only folder that knows click."""
