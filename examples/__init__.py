"""Small models trained and served with Native Sparse Attention and with full attention; see docs/examples.md. Run the scripts as files."""
