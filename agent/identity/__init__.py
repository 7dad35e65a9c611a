"""From a TLS peer or a token to a Principal."""
