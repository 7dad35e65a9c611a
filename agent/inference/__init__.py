"""Model packages, their verification, and the sessions that run them."""
