"""Lets torchvision's usual wheel import beside a CPU-only torch.

Beside a torch without CUDA the compiled half of that wheel does not load, and `import torchvision`
stops at two operators whose schemas it looks up. Declaring those is enough: everything written in
Python works, the compiled operators stay absent. dev.py copies this file into .venv, with a .pth
file that imports it, where it waits for torchvision and costs nothing else.
"""

import sys


class DeclareOperators:
    """A finder that finds nothing: it only notices that torchvision is about to be imported."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and DeclareOperators.library is None:
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(
                        f"{operator}(Tensor boxes, Tensor scores, float limit) -> Tensor"
                    )
                DeclareOperators.library = library  # the declarations live as long as this does
        return None


sys.meta_path.insert(0, DeclareOperators())
