"""The nodes, in the order of a graph."""

from .cache import Flux2KitReferenceCache
from .edit_lock import Flux2KitCompare, Flux2KitEditLock
from .enlarge import Flux2KitEnlarge
from .examples import Flux2KitExamplePicture
from .flex import Flux2KitFlex
from .grid import Flux2KitGrid
from .hosted import Flux2KitHosted, Flux2KitHostedCost
from .info import Flux2KitCheckpointInfo
from .inpaint import Flux2KitInpaint, Flux2KitOutpaint
from .kernels import Flux2KitKernelStatus
from .latents import Flux2KitEmptyLatent, Flux2KitVAEDecode, Flux2KitVAEEncode
from .loaders import (
    Flux2KitLoader,
    Flux2KitModelLoader,
    Flux2KitTextEncoderLoader,
    Flux2KitVAELoader,
)
from .lora import Flux2KitLoRA
from .negative import Flux2KitNegative
from .noise import Flux2KitNoise
from .plan import Flux2KitReferencePlan
from .preview import Flux2KitContinue, Flux2KitPreview
from .prompt import Flux2KitPrompt, Flux2KitPromptBatch, Flux2KitPromptCache
from .prompt_builder import Flux2KitPromptBuilder
from .references import Flux2KitApplyReferences, Flux2KitReference
from .regions import Flux2KitRegionPrompt
from .sampling import Flux2KitSampler
from .save import Flux2KitSaveQuantized
from .schema import ComfyExtension
from .solver import Flux2KitSolver
from .state import Flux2KitLoadState, Flux2KitSaveState
from .step_cache import Flux2KitStepCache
from .upsample import Flux2KitPromptUpsample
from .windows import Flux2KitWindows

NODES = [
    Flux2KitLoader,
    Flux2KitModelLoader,
    Flux2KitVAELoader,
    Flux2KitTextEncoderLoader,
    Flux2KitLoRA,
    Flux2KitCheckpointInfo,
    Flux2KitKernelStatus,
    Flux2KitSaveQuantized,
    Flux2KitPromptBuilder,
    Flux2KitPromptUpsample,
    Flux2KitPromptCache,
    Flux2KitPrompt,
    Flux2KitPromptBatch,
    Flux2KitReference,
    Flux2KitApplyReferences,
    Flux2KitRegionPrompt,
    Flux2KitNegative,
    Flux2KitReferenceCache,
    Flux2KitReferencePlan,
    Flux2KitStepCache,
    Flux2KitWindows,
    Flux2KitEmptyLatent,
    Flux2KitFlex,
    Flux2KitGrid,
    Flux2KitNoise,
    Flux2KitSolver,
    Flux2KitSampler,
    Flux2KitPreview,
    Flux2KitContinue,
    Flux2KitEnlarge,
    Flux2KitSaveState,
    Flux2KitLoadState,
    Flux2KitVAEEncode,
    Flux2KitVAEDecode,
    Flux2KitInpaint,
    Flux2KitOutpaint,
    Flux2KitEditLock,
    Flux2KitCompare,
    Flux2KitHosted,
    Flux2KitHostedCost,
    Flux2KitExamplePicture,
]


class Extension(ComfyExtension):
    """What the host asks for its list of nodes."""

    async def get_node_list(self):
        return NODES
