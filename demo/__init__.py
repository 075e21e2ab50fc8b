"""The emoji model: a small text-to-image diffusion pipeline on which a laptop can correct concepts and see the
result."""
