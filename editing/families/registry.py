"""The families that can be edited, by name and by the pipeline's class. Free of torch."""

from editing.errors import UnsupportedPipeline
from editing.families.auraflow import AURAFLOW
from editing.families.chroma import CHROMA
from editing.families.family import Family
from editing.families.flux import FLUX
from editing.families.flux2_klein import FLUX2_KLEIN
from editing.families.lumina2 import LUMINA2
from editing.families.pixart import PIXART_ALPHA, PIXART_SIGMA
from editing.families.qwen_image import QWEN_IMAGE
from editing.families.sana import SANA
from editing.families.sd import SD1, SD2, SDXL
from editing.families.sd3 import SD3
from editing.families.z_image import Z_IMAGE

FAMILIES = {
    family.name: family
    for family in (
        SD1, SD2, SDXL, SD3, FLUX, CHROMA, PIXART_ALPHA, PIXART_SIGMA, AURAFLOW, Z_IMAGE, FLUX2_KLEIN, QWEN_IMAGE,
        LUMINA2, SANA,
    )
}  # fmt: skip


def find_family(pipeline_class: object) -> Family:
    """Return the family of a class in `model_index.json`; of SD 1.x and 2.x, which share one, SD 1.x.

    Raises `UnsupportedPipeline` with the classes that are supported.
    """
    for family in FAMILIES.values():
        if family.pipeline_class == pipeline_class:
            return family
    supported = sorted({family.pipeline_class for family in FAMILIES.values()})
    raise UnsupportedPipeline(f"a {pipeline_class} cannot be edited: only {', '.join(supported)}")
