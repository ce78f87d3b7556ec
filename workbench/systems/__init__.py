"""What users would pick instead of an expert cache, measured the same way."""
