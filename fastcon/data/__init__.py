"""Images: where they are, which take part, which views are made of them, and their pixels."""
