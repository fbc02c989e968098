"""The pure part: decides, judges and remembers nothing. No clock, file, socket, log, environment or randomness."""
