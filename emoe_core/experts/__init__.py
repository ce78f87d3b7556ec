"""What a Mixture-of-Experts layer does in an engine: which experts it wants, gets instead, and computes."""
