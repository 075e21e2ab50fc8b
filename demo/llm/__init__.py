"""A pipeline in Z-Image's layout: SmolLM2 as it is, and a small transformer that was trained to draw what it says."""
