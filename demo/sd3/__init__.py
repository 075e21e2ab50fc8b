"""A pipeline in the layout of Stable Diffusion 3: two CLIPs, a T5 and a transformer, all trained on the emoji art."""
