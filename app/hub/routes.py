"""The read half of the Hugging Face Hub's protocol, for `from_pretrained`, `snapshot_download` and `hf download`."""

from fastapi import APIRouter

router = APIRouter()
