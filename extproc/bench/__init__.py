"""`perch bench`: what ext_proc costs on this machine, measured through the real Envoy with what perch ships."""
