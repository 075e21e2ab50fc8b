"""What of `docs/` is generated: reference pages out of the code, pictures out of our own runs."""
