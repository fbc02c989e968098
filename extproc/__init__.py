"""perch: an Envoy external processor and its controller that move users to a new model version safely."""
