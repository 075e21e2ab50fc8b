"""The service: HTTP, database, queue and storage. Everything but the mathematics, which is in `editing`."""
