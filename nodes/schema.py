"""What the node files take from the host's node API, and a Schema that older hosts accept."""

import inspect

from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["ComfyExtension", "References", "Schema", "State", "io", "ui"]

References = io.Custom("FLUX2KIT_REFERENCES")
State = io.Custom("FLUX2KIT_STATE")


def Schema(**fields) -> io.Schema:
    """io.Schema without the fields that this host does not know yet.

    ComfyUI Manager finds nodes by reading the source: a call of this very name, a literal id.
    """
    known = inspect.signature(io.Schema).parameters
    return io.Schema(**{name: value for name, value in fields.items() if name in known})
