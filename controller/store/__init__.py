"""The controller's state in a database: the only place that knows SQL."""
