"""What a plan costs on this machine, measured: modes beside the single device, in one run, in turn."""
