"""The data plane's process: entry, routes and the Open Inference Protocol's wire format."""
