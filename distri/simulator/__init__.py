"""Hardware, links and collectives as data, and the machine that runs a plan on simulated clocks; the home of simpy."""
