"""The controller's sub-commands of ``edgewarden``, found by entry points."""
