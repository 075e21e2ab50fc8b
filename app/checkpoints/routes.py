"""Apply edits, list and read checkpoints, move aliases."""

from fastapi import APIRouter

router = APIRouter()
