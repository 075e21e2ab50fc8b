"""Register base models and estimate their statistics."""

from fastapi import APIRouter

router = APIRouter()
