"""Realistic traffic for a demo or a rehearsal: digits the models never saw, users busy and quiet, labels later."""
