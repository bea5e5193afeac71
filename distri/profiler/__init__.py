"""Measure the machine at hand: layer times for the simulator (`measure`), links between ranks (`links`)."""
