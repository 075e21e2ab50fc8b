"""Edit what a text-to-image diffusion model knows: the method as a library, torch in and tensors out.

Stage I (`optimize_values`) finds for each edit the value that its key should retrieve. Stage II (`compute_update`)
writes all values into the text encoder at once, in closed form. The method is EMCID (Editing Massive Concepts In
text-to-image Diffusion models); equation numbers in this package are that paper's.

`__init__.pyi` lists the public names. Each is imported on first use, so that `editing.captions`, `editing.edits` and
`editing.prompts` load without torch.
"""

import lazy_loader

__version__ = "0.2.0"

ENGINE_VERSION = "4"
"""Changes whenever the same inputs may give other bytes; part of what identifies a value and a checkpoint."""

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
