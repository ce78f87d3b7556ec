"""Quality of answers under a budget: experiments, paired variants, similarity, log-probabilities."""
