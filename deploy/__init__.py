"""What runs beside the service and its models: `pull.py`, which is also used by itself."""
