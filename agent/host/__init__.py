"""What the agent sees and tells of its machine."""
