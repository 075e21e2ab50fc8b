from pathlib import Path

import pytest
import torch

from demo.sd3.draw import load_pipeline
from demo.sd3.interchange import TEMPLATE, encode
from demo.sd3.pipeline import CLIP_LENGTH, T5_LENGTH

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_after_the_last_block_only_the_subject_has_another_state(pipeline_folder: Path) -> None:
    pipeline = load_pipeline(pipeline_folder)
    plain, _, _, _ = pipeline.encode_prompt(
        [TEMPLATE.format("fox")], None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    changed, _ = encode(pipeline, ["fox"], ["dog"], layer=-1)
    differs = ((changed - plain).abs() > 1e-5).any(-1)[0]
    assert not differs[:CLIP_LENGTH].any(), "what is read of a CLIP comes before its last block"
    assert differs[CLIP_LENGTH:].nonzero().flatten().tolist() == [4]


@torch.no_grad()
def test_an_earlier_state_reaches_the_tokens_after_it(pipeline_folder: Path) -> None:
    pipeline = load_pipeline(pipeline_folder)
    plain, _ = encode(pipeline, ["fox"], ["fox"], layer=0)
    changed, _ = encode(pipeline, ["fox"], ["dog"], layer=0)
    assert ((changed - plain).abs() > 1e-5).any(-1)[0, CLIP_LENGTH:].sum() > 1


@torch.no_grad()
def test_names_of_different_lengths_are_refused(pipeline_folder: Path) -> None:
    with pytest.raises(ValueError, match="as many tokens"):
        encode(load_pipeline(pipeline_folder), ["fox"], ["zig zag"], layer=0)
