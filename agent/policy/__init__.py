"""From an input document to a Decision, by an Engine that can be killed."""
