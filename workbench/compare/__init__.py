"""Two recorded runs or sweeps against each other: what differs in what was run, and in what came out."""
