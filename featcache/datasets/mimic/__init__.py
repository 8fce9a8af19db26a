"""What every reader of MIMIC-CXR needs."""
