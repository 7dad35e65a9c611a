"""One file per flow, each readable from top to bottom; the only place where siblings meet."""
