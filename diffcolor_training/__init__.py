"""Training of the models that are bundled with `diffcolor_core`."""
