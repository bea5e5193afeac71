"""One file per operator: its geometry, the exchange that it needs when the image is split, and its MACs."""
