"""What the node files take from the host's node API, and a Schema that older hosts accept."""

import inspect

from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["ComfyExtension", "References", "io", "schema", "ui"]

References = io.Custom("FLUX2KIT_REFERENCES")


def schema(**fields) -> io.Schema:
    """io.Schema without the fields that this host does not know yet."""
    known = inspect.signature(io.Schema).parameters
    return io.Schema(**{name: value for name, value in fields.items() if name in known})
