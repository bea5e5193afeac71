"""Denoisers: capture into a layer graph, presets as data, loading, the shipped checkpoint. The home of diffusers."""
