"""What a checkpoint's folder holds: its files, its expert records, and the model built around them."""
