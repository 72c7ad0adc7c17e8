"""A discrete-event simulator: the real scheduler and memory accounts over a modelled device.

Imports numpy and the standard library; matplotlib only where plots are drawn.
"""
