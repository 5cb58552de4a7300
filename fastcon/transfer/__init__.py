"""Section 3 of the paper: how well frozen features transfer, by few-shot SVMs and by fine-tuning."""
