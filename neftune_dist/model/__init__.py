"""The model: found, built without memory, read slice by slice; its attention, loss and FLOPs."""
