# Written by client/generate_sync.py from emender/_async. Do not edit.
