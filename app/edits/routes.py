"""Ask for edits, follow them, read their values."""

from fastapi import APIRouter

router = APIRouter()
