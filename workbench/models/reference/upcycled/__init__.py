"""The upcycled kind: the dense parent's feed-forward copied into eight experts, each adapted to one domain."""
