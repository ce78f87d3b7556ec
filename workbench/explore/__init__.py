"""Exploring one model by hand: a kept engine, what a position of the sliders comes to, token by token."""
