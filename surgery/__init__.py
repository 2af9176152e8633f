"""Post-hoc model surgery: edit the task vector of a fine-tuned checkpoint, tensor by tensor."""

__version__ = "0.1.0"
