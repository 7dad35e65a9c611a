"""Processes with one job each: the zygote that forks them, the sandbox that confines them, the channels between."""
