"""Regions by embeddings: in place of texts, longer than the text encoder takes, beside prompts of another length."""

import pytest
import torch

from instantas.pipelines.attention import regional_prompts
from instantas.pipelines.pipeline import InstantASPipeline
from instantas.regions import Region
from instantas.testing import tiny

ALL, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_pipeline()


@pytest.fixture(scope="module")
def embedded(pipe):
    """(1, 16 n, 32) of n words."""

    @torch.no_grad()
    def encode(*words):
        return torch.cat([pipe.encode_prompt(word, "cpu", 1, False)[0] for word in words], dim=1)

    return encode


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def paint(pipe, *args, **settings):
    settings = dict(num_inference_steps=3, generator=torch.Generator().manual_seed(7), output_type="latent") | settings
    return pipe(*args, **settings).images


@pytest.mark.parametrize("base, region", [("a", "b"), ("a", "abc"), ("abc", "b"), ("ab", "cd"), ("ab", "abcd")])
@pytest.mark.parametrize("mode", ["blend", "joint"])
@torch.no_grad()
def test_a_region_over_everything_is_its_embedding_alone(pipe, embedded, noise, base, region, mode):
    """In one and in three parts, of any lengths; also as (L, D)."""
    words = embedded(*region)
    wanted = pipe.unet(noise, 500, words).sample
    for parts in ([ALL], [LEFT, RIGHT, ALL]):
        regions = [Region(box=box, embeds=words if box == ALL else words[0]) for box in parts]
        with regional_prompts(pipe.unet, regions, classifier_free_guidance=False, mode=mode):
            got = pipe.unet(noise, 500, embedded(*base)).sample
        assert error(got, wanted) < 1e-4
    assert error(pipe.unet(noise, 500, embedded(*base)).sample, wanted) > 1e-3


@torch.no_grad()
def test_texts_and_long_embeddings_in_one_picture(pipe, embedded, noise):
    """Each half is the picture of the two prompts at their own length, were attention all that there is."""
    long, short = embedded("red", "grass"), embedded("sky")

    def run(*regions, base):
        outputs = []
        attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
        hook = attn.register_forward_hook(lambda *call: outputs.append(call[-1]))
        with regional_prompts(pipe, regions, classifier_free_guidance=False):
            pipe.unet(noise, 500, base)
        hook.remove()
        return outputs[0].unflatten(1, (16, 16))

    left, right = run(base=long)[:, :, :8], run(base=short)[:, :, 8:]
    for base in (short, long, embedded("stone")):
        mixed = run(Region(box=LEFT, embeds=long), Region("sky", box=RIGHT), base=base)
        assert error(mixed[:, :, :8], left) < 1e-4
        assert error(mixed[:, :, 8:], right) < 1e-4


@torch.no_grad()
def test_negative_embeddings(pipe, embedded, noise):
    both = noise.repeat(2, 1, 1, 1)
    for negative in (dict(negative_embeds=embedded("sky")), dict(negative_embeds=embedded("sky")[0])):
        region = Region(box=ALL, embeds=embedded("grass"), negative_prompt="a label", **negative)
        with regional_prompts(pipe.unet, [region]):
            got = pipe.unet(both, 500, torch.cat([embedded("stone")] * 2)).sample
        assert error(got, pipe.unet(both, 500, torch.cat([embedded("sky"), embedded("grass")])).sample) < 1e-4


@pytest.mark.parametrize("size", [dict(), dict(height=128, width=200)])
def test_our_pipeline_with_long_prompts(pipe, embedded, size):
    ours = InstantASPipeline.from_pipe(pipe)
    base = dict(prompt_embeds=embedded("blue", "sky"), negative_prompt_embeds=embedded("", ""), **size)
    long = paint(ours, **base | {"prompt_embeds": embedded("red", "grass")})
    got = paint(ours, **base, regions=[Region("a label", box=ALL, embeds=embedded("red", "grass"))])
    assert error(got, long) < 1e-4
    short = paint(ours, "grass", negative_prompt="", **size)  # a text of half the length, its negative twice as long
    got = paint(ours, **base, regions=[Region("grass", box=ALL, negative_prompt="")])
    assert error(got, short) < 1e-4


def test_xl_needs_no_pooled_embedding_of_a_region():
    pipe = tiny.tiny_xl_pipeline()
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    grass, sky = (dict(zip(names, pipe.encode_prompt(word, device="cpu"))) for word in ("grass", "blue sky"))
    wanted = paint(pipe, **sky | {"prompt_embeds": grass["prompt_embeds"]})
    with regional_prompts(pipe, [Region(box=ALL, embeds=grass["prompt_embeds"])]):
        assert error(paint(pipe, **sky), wanted) < 1e-4


@pytest.mark.parametrize("shape", [(16, 31), (1, 32, 64)])
def test_embeddings_that_do_not_fit_are_refused_before_any_evaluation(pipe, embedded, noise, shape):
    evaluated = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda *_: evaluated.append(1))
    region = Region(box=ALL, embeds=torch.zeros(shape))
    words = r"^embeds: expected embeddings \(prompts, tokens, 32\)"
    with regional_prompts(pipe.unet, [region]), pytest.raises(ValueError, match=words):
        pipe.unet(noise.repeat(2, 1, 1, 1), 500, embedded("a").repeat(2, 1, 1))
    with pytest.raises(ValueError, match=words):
        paint(InstantASPipeline.from_pipe(pipe), "grass", regions=[region])
    hook.remove()
    assert not evaluated


@pytest.mark.parametrize("mode", ["blend", "joint"])
def test_texts_beside_a_base_prompt_of_another_length(pipe, embedded, mode):
    """16 tokens beside 21: the text alone where it is everywhere, in both halves of the batch."""
    odd = torch.cat([embedded("a"), embedded("b")[:, :5]], dim=1)
    ours, base = InstantASPipeline.from_pipe(pipe), dict(prompt_embeds=odd, negative_prompt_embeds=odd)
    got = paint(ours, **base, regions=[Region("grass", box=ALL, negative_prompt="sky")], region_mode=mode)
    assert error(got, paint(ours, "grass", negative_prompt="sky")) < 1e-4 < error(got, paint(ours, **base))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(21, 16), (5, 16), (24, 7)])
def test_prompts_of_unlike_lengths_share_a_softmax(pipe, embedded, noise, lengths):
    """Jointly, of equal weight everywhere: as one prompt of the tokens of both, none of them twice."""
    base, other = (torch.cat([embedded(w), embedded("b")], dim=1)[:, :n] for w, n in zip(("red", "sky"), lengths))
    region = Region(box=ALL, embeds=other)
    with regional_prompts(pipe.unet, [region], classifier_free_guidance=False, mode="joint", base_weight=1.0):
        got = pipe.unet(noise, 500, base).sample
    assert error(got, pipe.unet(noise, 500, torch.cat([base, other], dim=1)).sample) < 1e-4


def test_multidiffusion_takes_texts(pipe, embedded):
    ours = InstantASPipeline.from_pipe(pipe)
    for region in (Region(box=LEFT, embeds=embedded("a")), Region("b", box=LEFT, negative_embeds=embedded("a"))):
        with pytest.raises(ValueError, match="^embeds: expected None with method='multidiffusion'"):
            paint(ours, "grass", regions=[Region("sky", box=RIGHT), region], method="multidiffusion")
