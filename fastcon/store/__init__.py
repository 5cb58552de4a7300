"""The store of teacher logits: its format, its codecs, reading, writing, replaying its views."""
