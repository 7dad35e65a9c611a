"""What nodes and operators call."""
