"""Where the runs of a sweep are carried out: on this machine, or on a Ray cluster."""
