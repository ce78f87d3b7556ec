"""Serving on paper: measured costs, arrivals, a simulated engine under any scheduler, replicas behind a router.

`measure` times the real engine, `experiment` runs one configuration of the simulation, `comparison` several beside each
other, and `report` draws them.
"""
