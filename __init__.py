"""FLUX.2 Kit, a ComfyUI custom-node pack. Imports nothing at load: pytest reads this file too."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    from .nodes import Extension

    return Extension()
