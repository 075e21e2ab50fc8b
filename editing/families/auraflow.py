"""AuraFlow: UMT5. The states of the padding are zeros."""

from editing.families.family import Family, t5

AURAFLOW = Family("auraflow", "AuraFlowPipeline", (t5(max_length=256),), num_inference_steps=50, guidance_scale=3.5)
