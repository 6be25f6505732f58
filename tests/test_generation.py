"""Text that an MLLM writes: the tokens of transformers, whatever the batch, its padding and the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_support import TINY, abstract_params, random_media, random_params, tokenizer

from metacanvas_jax.data.batch import batch_of, mllm_inputs
from metacanvas_jax.mllm.generation import generate
from metacanvas_jax.mllm.prompt import END, PADDING, PromptConfig, Prompter
from metacanvas_jax.mllm.qwen2_5_vl.network import Qwen25VL
from metacanvas_jax.mllm.qwen2_5_vl.table import table
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, on_mesh, put_batch
from metacanvas_jax.weights.hf_import import load_params

MOST = 24
PROMPTS = (
    ["What is in this picture?"],
    ["A red cat", random_media((1, 4, 8), seed=1)],
    [random_media((1, 4, 8), seed=2), random_media((1, 4, 8), seed=3), "a cat beside a blue house, painted"],
    ["You are", random_media((1, 12, 20), seed=4), "a house"],
    [random_media((3, 4, 8), seconds=1.0, seed=5), "What is it?"],
    ["in", random_media((1, 12, 20), seed=6), random_media((3, 4, 8), seconds=0.5, seed=7), " the picture"],
    ["a"],
)
PROMPTER = Prompter(tokenizer(), PromptConfig(rule="transformers5", assistant=True))


@functools.cache
def prompts():
    return [PROMPTER(parts) for parts in PROMPTS]


@functools.cache
def compiled(most, stop):
    return jax.jit(lambda params, batch: generate(Qwen25VL(TINY), params, mllm_inputs(batch), most=most, stop=stop))


def write(params, rows, *, most=MOST, stop=(PROMPTER.ids[END],), prompter=PROMPTER, length=192):
    """The tokens that are written after some of the prompts, read as one batch; a list for each."""
    inputs = prompter.batch([prompts()[row] for row in rows], length=length)
    written = compiled(most, tuple(stop))(params, jax.tree.map(jnp.asarray, batch_of(inputs)))
    return written, [np.asarray(row[:n]).tolist() for row, n in zip(written.tokens, written.lengths, strict=True)]


@pytest.fixture(scope="module")
def params():
    return random_params(TINY, seed=3)


@pytest.fixture(scope="module")
def whole(params):
    """What is written after every prompt, in one batch."""
    return write(params, range(len(PROMPTS)))[1]


def test_every_step_writes_the_likeliest_token(params, whole):
    """Against the whole sequence read again without any cache."""
    rows = [0, 1, 4, 6]  # one batch: the lengths differ, so does where their own tokens stand
    texts = [np.asarray(whole[row], np.int32) for row in rows]
    continued = []
    for row, text in zip(rows, texts, strict=True):
        prompt = prompts()[row]
        after = prompt.positions.max() + 1 + np.arange(len(text), dtype=np.int32)
        continued.append(
            type(prompt)(
                np.concatenate([prompt.tokens, text]),
                np.concatenate([prompt.positions, np.broadcast_to(after, (3, len(after)))], axis=1),
                prompt.media,
            )
        )
    inputs = jax.tree.map(jnp.asarray, PROMPTER.batch(continued, length=224))
    model = Qwen25VL(TINY)

    @jax.jit
    def next_tokens(params, inputs):
        hidden = model.apply({"params": params}, inputs, cache=False, method="encode").hidden
        return jnp.argmax(model.apply({"params": params}, hidden, method="logits"), axis=-1)

    chosen = np.asarray(next_tokens(params, inputs))
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        start = len(prompts()[row].tokens)
        assert text.tolist() == chosen[number, start - 1 : start - 1 + len(text)].tolist()
    assert len({tuple(text) for text in whole}) == len(whole), "all prompts are answered alike: the test says nothing"


def test_what_is_written_depends_on_no_neighbour_and_no_padding(params, whole):
    left = Prompter(tokenizer(), PromptConfig(rule="transformers5", assistant=True, pad_left=True))
    assert write(params, [3, 1, 6, 1], prompter=left)[1] == [whole[row] for row in (3, 1, 6, 1)]
    assert write(params, [5, 0], length=208)[1] == [whole[row] for row in (5, 0)]


def test_text_ends_at_each_stop_and_never_later_than_asked(params, whole):
    text = whole[1]
    stop = text[7]
    first = text.index(stop)
    written, (got, other) = write(params, [1, 4], stop=(stop, PROMPTER.ids[PADDING]))
    assert got == text[:first]
    assert bool(written.ended[0]) and int(written.lengths[0]) == first
    assert set(np.asarray(written.tokens[0, first:]).tolist()) == {stop}, "nothing follows the end"
    assert other == whole[4][: len(other)] and len(other) != len(got)
    assert write(params, [1], stop=(text[0],))[1] == [[]], "the first token may end it"
    written, (short,) = write(params, [1], most=3, stop=(text[7],) if text[7] not in text[:3] else (299,))
    assert short == text[:3] and not bool(written.ended[0])


def test_generation_is_the_same_on_a_mesh(params, whole):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = [0, 3, 6, 5]
    inputs = PROMPTER.batch([prompts()[row] for row in rows], length=192)
    run = jax.jit(
        lambda params, batch: generate(Qwen25VL(TINY), params, mllm_inputs(batch), most=MOST, stop=(PROMPTER.ids[END],))
    )
    with on_mesh(mesh):
        written = run(params, put_batch(batch_of(inputs), mesh))
    lengths = np.asarray(written.lengths)
    assert [np.asarray(row[:n]).tolist() for row, n in zip(written.tokens, lengths, strict=True)] == [
        whole[row] for row in rows
    ]


def test_text_without_room_or_end_is_refused(params):
    for most, stop in ((0, (1,)), (4, ())):
        with pytest.raises(ValueError, match="room and an end"):
            write(params, [0], most=most, stop=stop)


@pytest.mark.torch
def test_greedy_text_equals_transformers(tmp_path):
    support = pytest.importorskip("qwen_torch_support")
    torch = support.torch
    reference = support.reference_model()
    reference.save_pretrained(tmp_path)
    params = load_params(tmp_path, table(TINY), abstract_params(TINY), progress=False)
    ours = write(params, range(len(PROMPTS)))[1]
    for prompt, own in zip(prompts(), ours, strict=True):
        expected = support.greedy(reference, prompt, MOST)
        assert own == expected
    assert torch.is_grad_enabled()
    assert len({tuple(text) for text in ours}) == len(ours) and max(len(set(text)) for text in ours) > 4
