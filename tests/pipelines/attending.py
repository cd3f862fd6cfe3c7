"""What the tests of regional prompts in a UNet share."""

import contextlib

from instantas.pipelines.attention import regional_prompts

ALL, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
WORDS = ("red brick wall", "grass", "blue sky", "the water")


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def regional(unet, text, regions, **settings):
    return regional_prompts(
        unet, regions, **dict(encode=lambda texts: text(*texts), classifier_free_guidance=False) | settings
    )


def cross_attention(unet):
    return [m for m in unet.modules() if hasattr(m, "is_cross_attention") and m.is_cross_attention]


@contextlib.contextmanager
def counted(unet, names=("to_k", "to_v", "to_kv")):
    """The calls of the projections of keys and values, by their name in the network."""
    calls, hooks = {}, []
    for name, module in unet.named_modules():
        if "attn2." in name and name.rpartition(".")[2] in names:
            calls[name] = 0

            def count(*_, name=name):
                calls[name] += 1

            hooks.append(module.register_forward_pre_hook(count))
    yield calls
    for hook in hooks:
        hook.remove()
