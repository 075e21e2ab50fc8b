"""Training of the emoji model, stage by stage: `python -m demo.train`, each stage resumable."""
