"""What a run is, with no tensor in sight: shapes, meshes, policies, the layer graph, plans and their rules."""
