"""Keys, certificates, and who is believed: the CA, endorsement keys, credentials, admins."""
