"""Outside text (flags, YAML, JSON) to core values: the only package that parses."""
