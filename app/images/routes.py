"""Upload reference images."""

from fastapi import APIRouter

router = APIRouter()
