"""The agent's own listeners: health and metrics, the admin socket, Evidence for controllers."""
