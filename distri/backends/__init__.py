"""The interpreters of a plan: `in_process` is the definition, `torch_distributed` moves bytes, `simulated` a clock."""
