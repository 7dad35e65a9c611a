"""The Merkle audit log: pure tree, segments on disk, group commit."""
