"""Which experts should be resident for the requests to come, and how often that is decided (section 3)."""
