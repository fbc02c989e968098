"""A model server for the Open Inference Protocol V2 over aiohttp."""
