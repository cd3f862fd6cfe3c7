"""InstantAS: minimum coverage sampling for arbitrary-size image generation.

The names below are imported when they are first used: `import instantas.ops` needs only torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {  # name -> the module that has it; of a module, itself
    "InstantASPipeline": "instantas.pipelines.pipeline",
    "Region": "instantas.regions",
    "RegionMap": "instantas.regions",
    "RegionalAttnProcessor": "instantas.pipelines.attention",
    "WindowPlan": "instantas.windows",
    "Windowed": "instantas.sampling.hosted",
    "demo": "instantas.demo",
    "ops": "instantas.ops",
    "regional_prompts": "instantas.pipelines.attention",
    "sample": "instantas.sampling.sampler",
    "windowed": "instantas.pipelines.windowed",
}

__all__ = [
    "InstantASPipeline",
    "Region",
    "RegionMap",
    "RegionalAttnProcessor",
    "WindowPlan",
    "Windowed",
    "__version__",
    "demo",
    "ops",
    "regional_prompts",
    "sample",
    "windowed",
]

if TYPE_CHECKING:
    from instantas import demo, ops
    from instantas.pipelines.attention import RegionalAttnProcessor, regional_prompts
    from instantas.pipelines.pipeline import InstantASPipeline
    from instantas.pipelines.windowed import windowed
    from instantas.regions import Region, RegionMap
    from instantas.sampling.hosted import Windowed
    from instantas.sampling.sampler import sample
    from instantas.windows import WindowPlan


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'instantas' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if module.__name__ == f"instantas.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
