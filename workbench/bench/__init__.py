"""The speed bench: systems side by side, under one hard memory limit, beside what the hardware allows."""
