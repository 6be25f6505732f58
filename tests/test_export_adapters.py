"""Exported transformers and adapters in diffusers and peft: they load, and do what ours do."""

import logging

import export_support as support
import pytest
from export_support import CHANNELS, draw, is_mllm_adapter

from metacanvas_jax.trees import flat
from metacanvas_jax.weights import saved

pytest_plugins = "exported_support"
pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pytest.importorskip("peft", reason="needs the [torch] extra")


def test_exported_transformer_loads_in_diffusers_without_a_missing_key(exported):
    from diffusers import SanaTransformer2DModel

    _, _, _, folder, _ = exported("sana")
    _, info = SanaTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


# peft asks transformers for an attribute that it renames.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_exported_adapters_of_the_mllm_load_in_peft_and_do_what_ours_do(exported, qwen):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    from metacanvas_jax.torch_export.lora import Adapters, read_peft

    _, leaves, _, folder, _ = exported("sana")
    tokens = torch.arange(20, 30)[None]
    positions = torch.arange(10).expand(3, 1, 10)
    ours = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen / "qwen", dtype=torch.float32).eval()
    adapters = Adapters(ours, *read_peft(folder / "mllm_lora"))
    count = sum(is_mllm_adapter(path) and path.endswith("/a") for path in leaves) * support.LANGUAGE.layers
    assert len(adapters.layers) == count
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen / "qwen", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder / "mllm_lora").eval()  # a warning is an error here
    with torch.no_grad():
        run = lambda model: model(input_ids=tokens, position_ids=positions).logits  # noqa: E731
        with_adapters, adapted = run(ours), run(theirs)
        with adapters.switched(False), theirs.disable_adapter():
            plain, bare = run(ours), run(theirs)
    torch.testing.assert_close(adapted, with_adapters, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bare, plain, atol=0, rtol=0)
    assert (adapted - bare).abs().max() > 1e-2


def test_exported_adapters_of_the_transformer_load_in_diffusers_and_do_what_ours_do(exported, caplog):
    from diffusers import SanaTransformer2DModel

    from metacanvas_jax.torch_export.lora import Adapters, read_diffusers

    _, leaves, _, folder, _ = exported("sana")
    ours, theirs = (SanaTransformer2DModel.from_pretrained(folder / "transformer").eval() for _ in range(2))
    adapters = Adapters(ours, *read_diffusers(folder / "transformer_lora"))
    count = sum(path.startswith("dit/") and path.endswith("_lora/a") for path in leaves) * support.DITS["sana"].layers
    assert len(adapters.layers) == count == 20
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        theirs.load_lora_adapter(folder / "transformer_lora", weight_name="pytorch_lora_weights.safetensors")
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records, caplog.text
    call = {
        "hidden_states": torch.from_numpy(draw(1, CHANNELS, 3, 4, seed=1)),
        "encoder_hidden_states": torch.from_numpy(draw(1, 5, 16, seed=2)),
        "timestep": torch.tensor([700.0]),
    }
    with torch.no_grad():
        with_adapters, adapted = ours(**call).sample, theirs(**call).sample
        with adapters.switched(False):
            plain = ours(**call).sample
    torch.testing.assert_close(adapted, with_adapters, atol=1e-5, rtol=1e-5)
    assert (adapted - plain).abs().max() > 1e-2


def test_a_transformer_of_diffusers_is_imported_as_parameters_of_ours(exported, tmp_path):
    from metacanvas_jax.cli.main import main

    _, leaves, _, folder, _ = exported("sana")
    assert main(["import", "--from", str(folder / "transformer"), "--to", str(tmp_path / "params")]) == 0
    params, info = saved.load(tmp_path / "params")
    expected = {path: value for path, value in leaves.items() if path.startswith("dit/") and "_lora/" not in path}
    assert {f"dit/{path}" for path in flat(params)} == expected.keys()
    for path, value in flat(params).items():
        assert value.tobytes() == expected[f"dit/{path}"].tobytes(), path
    assert info["meta"]["model"] == "SanaConfig"
